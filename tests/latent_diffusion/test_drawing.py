"""Pictures of prompts are those of diffusers' pipeline from the same noise, however many are drawn at once."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from common.cli import Parser, UserError, options_from
from common.images import to_uint8
from common.sampling import ImageNoise
from latent_diffusion.base import load_base
from latent_diffusion.drawing import PromptOptions, PromptSampler, add_drawing_flags, draw_prompts, load_chosen_base

ITEMS = [("red circle", (1,)), ("", (2,)), ("gold circle with blue background", (1, 5))]
OPTIONS = PromptOptions(steps=3, seed=7, guidance_scale=3.0)


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


@pytest.mark.parametrize("options", [OPTIONS, replace(OPTIONS, timestep_spacing="leading", final_alpha="first")])
def test_pictures_are_the_pipelines(base, pipeline_folder, options):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    ours = {"timestep_spacing": options.timestep_spacing, "set_alpha_to_one": options.final_alpha == "one"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **ours)
    noise = ImageNoise([(7, 1), (7, 2), (7, 1, 5)]).draw((4, 8, 8))
    prompts = [prompt for prompt, _ in ITEMS]
    theirs = pipeline(prompts, latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="np").images
    ours = draw_prompts(base, ITEMS, options)
    assert theirs.std() > 0.05
    wanted = to_uint8(torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1)
    assert (ours.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_picture_depends_on_its_key_and_prompt_alone(base, batch_size):
    together = draw_prompts(base, ITEMS, OPTIONS)
    apart = draw_prompts(base, ITEMS, PromptOptions(steps=3, seed=7, guidance_scale=3.0, batch_size=batch_size))
    assert (together.int() - apart.int()).abs().max() <= 1
    alone = draw_prompts(base, ITEMS[2:], OPTIONS)
    assert (together[2:].int() - alone.int()).abs().max() <= 1
    other = draw_prompts(base, [(ITEMS[2][0], (1,))], OPTIONS)
    assert (other.int() - alone.int()).abs().max() > 1


def test_what_overflows_in_half_precision_is_drawn_in_fp32(base, pipeline_folder, capsys):
    half = load_base(pipeline_folder, dtype=torch.float16)
    for loaded in (base, half):
        loaded.unet.conv_in.weight *= 2e4  # the norm after it undoes this where numbers reach so far
    try:
        exact = draw_prompts(base, ITEMS, OPTIONS)
        capsys.readouterr()
        assert (draw_prompts(half, ITEMS, OPTIONS).int() - exact.int()).abs().max() <= 4
    finally:
        base.unet.conv_in.weight /= 2e4
    assert {model.dtype for model in (half.unet, half.vae, half.text_encoder)} == {torch.float32}
    assert capsys.readouterr().err.count("warning: half precision overflows; drawing in fp32 from here on\n") == 1


def test_what_is_not_finite_is_no_picture(pipeline_folder):
    broken = load_base(pipeline_folder)
    broken.unet.conv_out.bias[0] = torch.inf
    with pytest.raises(UserError, match=r"^'red circle': drawn in fp32 it is not finite; name other weights"):
        draw_prompts(broken, ITEMS, OPTIONS)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"steps": 1001}, "--steps 1001: "),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"guidance_scale": float("nan")}, "--guidance-scale nan: must be at least 0"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(base, flag, complaint):
    with pytest.raises(UserError, match=f"^{complaint}"):
        PromptSampler(base).images(ITEMS, PromptOptions(**flag))


def test_flags_name_the_options_and_the_base(pipeline_folder):
    parser = Parser()
    add_drawing_flags(parser, sampler="dpm-solver++")
    parser.add_argument("base")
    assert options_from(args := parser.parse_args([str(pipeline_folder)]), PromptOptions) == PromptOptions(
        sampler="dpm-solver++"
    )
    assert options_from(args, PromptOptions).scale == 7.5
    args = parser.parse_args([str(pipeline_folder), "--guidance-scale", "2", "--precision", "bf16", "--device", "cpu"])
    assert options_from(args, PromptOptions).scale == 2
    assert load_chosen_base(args).unet.dtype == torch.bfloat16

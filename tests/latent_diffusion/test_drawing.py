"""Pictures of prompts are those of diffusers' pipeline from the same noise, however many are drawn at once."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from common.images import to_uint8
from common.sampling import ImageNoise
from latent_diffusion.base import load_base, quiet
from latent_diffusion.drawing import draw_prompts

PROMPTS = ["red circle", "", "gold circle with blue background"]
KEYS = [(0, 1), (0, 2), (7, 1)]


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


def test_pictures_are_the_pipelines(base, pipeline_folder):
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    noise = ImageNoise(KEYS).draw((4, 8, 8))
    theirs = pipeline(PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    ours = draw_prompts(base, PROMPTS, KEYS, steps=4, guidance_scale=3.0)
    assert (ours.shape, ours.dtype) == ((3, 3, 64, 64), torch.uint8)
    assert theirs.std() > 0.05
    wanted = to_uint8(torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1)
    assert (ours.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_picture_depends_on_its_key_and_prompt_alone(base, batch_size):
    together = draw_prompts(base, PROMPTS, KEYS, steps=3)
    apart = draw_prompts(base, PROMPTS, KEYS, steps=3, batch_size=batch_size)
    assert (together.int() - apart.int()).abs().max() <= 1
    alone = draw_prompts(base, PROMPTS[2:], KEYS[2:], steps=3)
    assert (together[2:].int() - alone.int()).abs().max() <= 1
    other = draw_prompts(base, PROMPTS[2:], KEYS[:1], steps=3)
    assert (other.int() - alone.int()).abs().max() > 1


def test_lower_precision_stays_near(base, pipeline_folder):
    exact = draw_prompts(base, PROMPTS, KEYS, steps=3)
    near = draw_prompts(load_base(pipeline_folder, dtype=torch.bfloat16), PROMPTS, KEYS, steps=3)
    difference = (exact.float() - near.float()).abs()
    assert 0 < difference.mean() < 4


def test_what_is_not_finite_is_no_picture(pipeline_folder):
    broken = load_base(pipeline_folder)
    broken.unet.conv_out.bias[0] = torch.inf
    with pytest.raises(FloatingPointError):
        draw_prompts(broken, PROMPTS, KEYS, steps=2)

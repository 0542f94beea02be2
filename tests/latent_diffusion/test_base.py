"""The frozen base: read, used and written as diffusers' own pipeline does it, drawn with, and bad folders refused."""

import json
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from common.cli import UserError
from latent_diffusion.base import load_base, load_part, prompt_tokens, read_schedule, vector_tokens
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.files import SD_V1
from latent_diffusion.saving import save_base

PROMPTS = ["red circle with blue background", "", "Two GOLD circles!"]
ITEMS = [("red circle", (1,)), ("", (2,)), ("gold circle with blue background", (1, 5))]
OPTIONS = PromptOptions(steps=3, seed=7, guidance_scale=3.0, batch_size=2)


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


@pytest.fixture
def copied(pipeline_folder, tmp_path):
    """A pipeline folder to spoil."""
    return shutil.copytree(pipeline_folder, tmp_path / "base")


def test_contexts_are_the_pipelines(base, pipeline):
    with torch.no_grad():
        theirs, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    ours = base.encode_prompts(PROMPTS)
    assert (ours - theirs).abs().max() <= 1e-6
    assert (ours[1] - null[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_is_diffusers_own_and_never_other_threads_default(pipeline_folder, monkeypatch, capfd, dtype):
    theirs = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True, dtype=dtype)
    capfd.readouterr()
    defaults = []
    monkeypatch.setattr(torch, "set_default_dtype", defaults.append)
    ours = load_base(pipeline_folder, dtype=dtype)
    assert set(defaults) <= {torch.float32}
    assert capfd.readouterr().err == ""
    for name in ("unet", "vae", "text_encoder"):
        torch.testing.assert_close(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict(), rtol=0, atol=0)


def test_latents_and_images_are_the_vaes(base, pipeline, monkeypatch):
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mode() * 0.5
        decoded = pipeline.vae.decode(latents / 0.5).sample
    assert base.encode_images(images).shape == (5, 4, 8, 8)
    assert (base.encode_images(images) - latents).abs().max() <= 1e-5
    sizes, whole = [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, part: sizes.append(len(part)) or whole(vae, part))
    for pixels, expected in ((2**18, [5]), (2 * 64**2, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr("latent_diffusion.base.PIXELS_AT_ONCE", pixels)
        sizes.clear()
        assert (base.decode(latents) - decoded).abs().max() <= 1e-5
        assert sizes == expected


def test_a_vae_that_overflows_in_half_precision_decodes_in_fp32(pipeline_folder, monkeypatch, capsys):
    """Weights that fit fp16 and sums that do not: without the second attempt the pictures would be black."""
    monkeypatch.setattr("latent_diffusion.base.PIXELS_AT_ONCE", 1)
    exact, base = load_base(pipeline_folder), load_base(pipeline_folder, dtype=torch.float16)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    near = base.decode(latents)
    assert (base.vae.dtype, capsys.readouterr().err) == (torch.float16, "")
    for loaded in (exact, base):
        loaded.vae.decoder.conv_in.weight *= 5e4
    assert not base.vae.decode(latents.half() / 0.5).sample.isfinite().all()
    assert (base.decode(latents) - exact.decode(latents)).abs().max() < 0.05
    assert (near - exact.decode(latents)).abs().max() > 0.05
    err = capsys.readouterr().err
    assert (err.count("\n"), err.startswith("warning: the VAE overflows in half precision")) == (1, True)
    assert base.vae.dtype == torch.float32


def test_everything_is_frozen_in_eval_mode_and_channels_last(pipeline_folder):
    base = load_base(pipeline_folder, dtype=torch.bfloat16)
    for model in (base.vae, base.text_encoder, base.unet):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert base.unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert base.encode_prompts(["red"]).dtype == torch.bfloat16
    assert base.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


@pytest.fixture(params=["small", "published"])
def tokenizer(request, pipeline_folder):
    """Knows words of several vectors."""
    tokenizer = load_part(pipeline_folder if request.param == "small" else SD_V1, "tokenizer")
    for token, vectors in {"<cat>": 3, "<c(a.t>": 11, "<dog>": 1}.items():
        tokenizer.add_tokens(vector_tokens(token, vectors))
    return tokenizer


@pytest.mark.parametrize(
    "prompt", ["a <cat> and a <dog>", "<c(a.t><cat>, <cat>!", "", "<dog> <dog>_1", "<cat>_2 and <cat>_1"]
)
def test_prompts_are_expanded_as_diffusers_does(tokenizer, prompt):
    theirs = object.__new__(StableDiffusionPipeline).maybe_convert_prompt(prompt, tokenizer)
    wanted = tokenizer([theirs], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(prompt_tokens(tokenizer, [prompt]), wanted)
    assert torch.equal(prompt_tokens(tokenizer, [prompt.upper()]), wanted)


def test_a_long_prompt_is_cut_with_one_warning(base, tokenizer, capsys):
    long = "a b " * 60  # a token a letter
    contexts = base.encode_prompts(["red", long], ["prompt.json line 1", "prompt.json line 2"])
    assert (contexts[1] - base.encode_prompts([long[:150]])[0]).abs().max() <= 1e-6  # 75 letters and two marks just fit
    assert prompt_tokens(tokenizer, ["x", "<c(a.t> " * 7]).shape == (2, 77)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: prompt.json line 2: prompt of 122 tokens is cut to 77: 'a b a b")
    assert second.startswith("warning: prompt of 79 tokens is cut to 77: '<c(a.t> <c(a.t>")


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
def test_schedules_are_the_schedulers(tmp_path, beta_schedule, theirs, ours):
    scheduler = DDIMScheduler(500, 0.00085, 0.012, beta_schedule, prediction_type=theirs)
    scheduler.save_pretrained(tmp_path)
    schedule, prediction = read_schedule(tmp_path / "scheduler_config.json")
    assert prediction == ours
    assert (schedule.alphas_cumprod - scheduler.alphas_cumprod).abs().max() <= 1e-6


def test_a_picture_depends_on_its_key_and_prompt_alone(base):
    in_twos, together = draw_prompts(base, ITEMS, OPTIONS), draw_prompts(base, ITEMS, replace(OPTIONS, batch_size=8))
    assert (together.int() - in_twos.int()).abs().max() <= 1
    alone = draw_prompts(base, ITEMS[1:], OPTIONS)
    assert (together[1:].int() - alone.int()).abs().max() <= 1
    other = draw_prompts(base, [(ITEMS[2][0], (1,))], OPTIONS)
    assert (other[0].int() - alone[1].int()).abs().max() > 1


def test_what_is_not_finite_in_half_precision_is_drawn_in_fp32_and_else_no_picture(pipeline_folder, capsys):
    broken = load_base(pipeline_folder, dtype=torch.float16)
    broken.unet.conv_out.bias[0] = torch.inf
    with pytest.raises(UserError, match=r"^'red circle': drawn in fp32 it is not finite; name other weights"):
        draw_prompts(broken, ITEMS, OPTIONS)
    assert {model.dtype for model in (broken.unet, broken.vae, broken.text_encoder)} == {torch.float32}
    assert capsys.readouterr().err.count("warning: half precision overflows; drawing in fp32 from here on\n") == 1


def test_a_saved_base_is_a_pipeline_in_fp16(base, tmp_path, pipeline):
    folder = tmp_path / "new" / "base"
    save_base(folder, base)
    again = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"latents": latents, "num_inference_steps": 2, "output_type": "np"}
    images = [p("a red circle", **options).images for p in (pipeline, again)]
    assert images[0].std() > 0.01
    assert np.abs(images[0] - images[1]).max() <= 0.02
    for name in ("unet", "vae", "text_encoder"):
        file = next((folder / name).glob("*.safetensors"))
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {torch.float16}
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((folder / "model_index.json").stat().st_mode)
    assert next(base.unet.parameters()).dtype == torch.float32
    rounded = load_base(folder)
    assert (rounded.schedule, rounded.prediction) == (base.schedule, base.prediction)


def test_a_full_disk_leaves_the_old_folder(base, copied, full_disk):
    def files():
        return {path: path.is_file() and path.read_bytes() for path in copied.parent.rglob("*")}

    before = files()
    with full_disk(10_000), pytest.raises(UserError, match=f"^{copied}: cannot be written"):
        save_base(copied, base)
    assert files() == before


@pytest.mark.parametrize("form", ["bin", "fp16", "hub"])
def test_folders_of_other_forms_are_read_quietly(copied, form, capsys):
    expected = load_base(copied)
    for file in [*copied.glob("*/*model.safetensors")]:
        if form == "fp16":
            file.rename(file.with_suffix(".fp16.safetensors"))
        elif form == "bin":
            name = "pytorch_model.bin" if "text_encoder" in str(file) else f"{file.stem}.bin"
            torch.save(load_file(file), file.with_name(name))
            file.unlink()
    if form == "hub":
        shutil.copytree(copied, copied / "snapshots" / "0123abc")
        shutil.rmtree(copied / "scheduler")
    read = load_base(copied)
    for part in ("unet", "vae", "text_encoder"):
        found, wanted = (getattr(one, part).state_dict() for one in (read, expected))
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert capsys.readouterr().err == ""


def cut(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def without_a_weight(folder):
    tensors = load_file(file := folder / "text_encoder" / "model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, file, {"format": "pt"})


def scheduler_with(**changes):
    def spoil(folder):
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def wide(folder):
    file = folder / "unet" / "config.json"
    unet = load_base(folder).unet
    unet = type(unet).from_config(json.loads(file.read_text()) | {"cross_attention_dim": 24})
    unet.save_pretrained(folder / "unet")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (shutil.rmtree, "{base}: no such file or folder; name a Stable Diffusion"),
        (lambda folder: shutil.rmtree(folder / "vae"), "{base}/vae: no such folder; a base has vae, text_encoder"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "{base}: has no scheduler/scheduler_config.json, but "),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "{base}/tokenizer: holds neither"),
        (cut, "{base}/unet: not a UNet2DConditionModel ("),
        (without_a_weight, "{base}/text_encoder: lacks 1 weights (embeddings.position_embedding.weight"),
        (wide, "{base}: its text encoder gives width 16, its unet wants 24; name another base"),
        (scheduler_with(beta_schedule="sigmoid"), "{base}/scheduler/scheduler_config.json: its beta_schedule is sig"),
        (scheduler_with(prediction_type="flow"), "{base}/scheduler/scheduler_config.json: its prediction_type is f"),
        (scheduler_with(trained_betas=[0.1]), "{base}/scheduler/scheduler_config.json: has trained_betas"),
    ],
)
def test_bad_folders_are_refused_in_one_line(copied, refusal, spoil, complaint):
    spoil(copied)
    assert refusal(load_base, copied).startswith(complaint.replace("{base}", str(copied)))

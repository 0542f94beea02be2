"""Stable Diffusion v1 from its single file: against diffusers' conversion and modules, in every form it comes in."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from common.cli import UserError
from latent_diffusion.base import load_base
from latent_diffusion.files import SD_V1, WeightsFile, cache_folder, make_models
from latent_diffusion.saving import save_base
from tests.stable_diffusion import KEYS

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def base(sd_file):
    return load_base(sd_file)


def config(name: str, **sizes) -> dict:
    return json.loads((SD_V1 / name / "config.json").read_text()) | sizes


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_published_list_is_matched_without_rest():
    shapes = {name: tuple(shape) for name, shape in KEYS["sd_v1"].items()}
    models = make_models(WeightsFile(Path("sd-v1-4.ckpt"), shapes))
    numbers = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert numbers == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert sum(len(model.state_dict()) for model in models.values()) == len(shapes) - 1  # position_ids
    for name, model in models.items():
        written = config(name)
        assert {key: model.config.to_dict()[key] if name == "text_encoder" else model.config[key] for key in written
                if not key.startswith("_")} == {k: v for k, v in written.items() if not k.startswith("_")}  # fmt: skip


@torch.no_grad()
def test_unet_is_diffusers_own(base, sd_state):
    widths = {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 48}
    theirs = UNet2DConditionModel(**config("unet", **widths)).eval()
    theirs.load_state_dict(convert_ldm_unet_checkpoint(sd_state, theirs.config))
    assert same(base.unet, theirs)
    generator = torch.Generator().manual_seed(0)
    xt, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([3, 801])
    context = torch.randn(2, 77, 48, generator=generator)
    expected = theirs(xt, t, context).sample
    assert expected.std() > 0.1
    assert (base.unet(xt, t, context).sample - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_vae_is_diffusers_own(base, sd_state):
    theirs = AutoencoderKL(**config("vae", block_out_channels=(32, 64, 128, 128))).eval()
    theirs.load_state_dict(convert_ldm_vae_checkpoint(sd_state, theirs.config))
    assert same(base.vae, theirs)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = theirs.encode(images).latent_dist.mean * 0.18215
    assert (base.encode_images(images) - latents).abs().max() <= 1e-4
    assert (base.decode(latents) - theirs.decode(latents / 0.18215).sample.clamp(-1, 1)).abs().max() <= 1e-4


@torch.no_grad()
def test_text_encoder_is_transformers_own(base, sd_state):
    sizes = CLIPTextConfig(**config("text_encoder", hidden_size=48, intermediate_size=192))
    state = convert_ldm_clip_checkpoint(sd_state)
    state.pop("text_model.embeddings.position_ids")
    theirs = CLIPTextModel(sizes).eval()
    theirs.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in state.items()})
    assert same(base.text_encoder, theirs)
    # As OpenAI's own tokenizer has them; the end of text is the padding too.
    tokens = [49406, 736, 7117, 593, 1395, 10763, 8291, 267, 15304, 256, 49407]
    expected = theirs(torch.tensor([tokens + [49407] * (77 - len(tokens))])).last_hidden_state
    context = base.encode_prompts(["Red circle with light goldenrod , café !"])
    assert context.shape == (1, 77, 48)
    assert (context - expected).abs().max() <= 1e-4


def test_schedule_is_that_of_stable_diffusion(base):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert (base.schedule.alphas_cumprod - (1 - betas).cumprod(0)).abs().max() <= 1e-12
    assert (base.prediction, base.factor, base.unet.config.sample_size) == ("eps", 8, 64)


def test_everything_is_frozen(base):
    models = base.unet, base.vae, base.text_encoder
    assert not any(model.training or p.requires_grad for model in models for p in model.parameters())


def test_a_saved_folder_is_the_same_base(base, tmp_path):
    save_base(tmp_path / "folder", base)
    again = load_base(tmp_path / "folder")
    prompts = ["red circle with blue background"]
    assert (again.encode_prompts(prompts) - base.encode_prompts(prompts)).abs().max() <= 1e-2  # through fp16
    assert again.schedule == base.schedule


@pytest.fixture
def lightning(monkeypatch):
    """The class of a training library that is not installed where files are read: it must not be there to run."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, module)
    return module.ModelCheckpoint


def like_lightning(state, callback) -> dict:
    """What lies in `sd-v1-4.ckpt` beside the weights."""
    score = {"best_model_score": torch.tensor(0.5), "current": np.float64(0.25), "monitor": "val/loss"}
    schedule = {name: torch.rand(1000) for name in ("betas", "alphas_cumprod", "posterior_variance")}
    used = callback()
    used.best_k_models = {"a": 1}
    return {
        "epoch": 5,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": schedule | state,
        "callbacks": {callback: score, "again": used},
        "lr_schedulers": [{"last_epoch": 1}],
    }


def renamed(state, old: str, new: str) -> dict:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def averaged(state) -> dict:
    """With averaged weights that are the right ones, beside spoiled ones."""
    unet = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor for name, tensor in unet.items()}
    count = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return state | {name: tensor + 1 for name, tensor in unet.items()} | average | count


FORMS = {
    "bare": lambda state: state,
    "with the VAE's discriminator": lambda state: state | {"first_stage_model.loss.logvar": torch.zeros(())},
    "without position_ids": lambda state: {name: t for name, t in state.items() if not name.endswith("position_ids")},
    "later text model": lambda state: renamed(state, "transformer.text_model.", "transformer."),
    "averaged": averaged,
    "linear attention": lambda state: {
        name: t[:, :, 0, 0] if ".attn_1." in name and t.ndim == 4 else t for name, t in state.items()
    },
}


@pytest.mark.parametrize(("form", "suffix"), [("bare", "ckpt"), *((form, "safetensors") for form in FORMS)])
def test_every_form_of_the_file(sd_state, base, tmp_path, form, suffix):
    state, path = FORMS[form](sd_state), tmp_path / f"sd.{suffix}"
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    torch.save(state, path) if suffix == "ckpt" else save_file(state, path)
    read = load_base(path)
    for name in ("unet", "vae", "text_encoder"):
        assert same(getattr(read, name), getattr(base, name))


def test_half_precision_on_disk_and_in_memory(sd_state, base, tmp_path):
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": {name: t.half() if t.is_floating_point() else t for name, t in sd_state.items()}}, path)
    read = load_base(path)
    assert read.unet.dtype == torch.float32
    assert torch.equal(read.unet.conv_in.weight, base.unet.conv_in.weight.half().float())
    assert load_base(path, dtype=torch.bfloat16).unet.conv_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_a_ckpt_is_converted_once(sd_state, base, tmp_path, lightning, zipped, monkeypatch):
    path, cache = tmp_path / "sd-v1-4.ckpt", tmp_path / "cache"
    torch.save(like_lightning(averaged(sd_state), lightning), path, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    first = load_base(path, cache=cache)
    (copy,) = cache.iterdir()
    assert copy.name.startswith("sd-v1-4-")
    assert load_file(copy).keys() == {name for name in sd_state if not name.endswith("position_ids")}
    monkeypatch.setattr(torch, "load", None)
    second = load_base(path, cache=cache)
    for read in (first, second):
        assert all(same(getattr(read, name), getattr(base, name)) for name in ("unet", "vae", "text_encoder"))
    monkeypatch.undo()
    torch.save(sd_state | {FIRST: torch.zeros_like(sd_state[FIRST])}, path)
    assert load_base(path, cache=cache).unet.conv_in.weight.abs().max() == 0
    assert len(list(cache.iterdir())) == 2


def test_a_safetensors_file_needs_no_copy(sd_file, tmp_path):
    load_base(sd_file, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_costs_no_more_than_the_copy(sd_state, base, tmp_path, full_disk, capsys):
    path = tmp_path / "sd.ckpt"
    torch.save(sd_state, path)
    with full_disk(2**20):
        read = load_base(path, cache=tmp_path / "cache")
    assert same(read.unet, base.unet)
    assert not list((tmp_path / "cache").iterdir())
    err = capsys.readouterr().err
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dlcv-hw2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dlcv-hw2"


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_reading_in_pieces_gives_the_same(sd_state, base, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"sd.{suffix}"
    torch.save(sd_state, path) if suffix == "ckpt" else save_file(sd_state, path)
    monkeypatch.setattr("latent_diffusion.files.AT_ONCE", 100_000)
    assert same(load_base(path).vae, base.vae)


def test_missing_and_further_weights_are_named(sd_state, tmp_path):
    state = {name: tensor for name, tensor in sd_state.items() if name != FIRST}
    save_file(state | {"first_stage_model.extra.weight": torch.zeros(1)}, path := tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"sd.safetensors: does not fit UNet2DConditionModel: 1 missing \(conv_in"):
        load_base(path)
    save_file(sd_state | {"first_stage_model.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"AutoencoderKL: 1 unexpected \(extra.weight\)"):
        load_base(path)

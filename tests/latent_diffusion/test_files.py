"""Stable Diffusion v1 from its single file, in every form it comes in; other files are refused, and no code runs."""

import io
import os
import pickle
import shutil
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

from common.checkpoint import save_tensors
from common.cli import UserError
from latent_diffusion.base import load_base
from latent_diffusion.clip import Clip
from latent_diffusion.files import UNET, WeightsFile, make_models, read_config
from p3_controlnet.model import ControlNet
from tests.stable_diffusion import KEYS

FIRST = f"{UNET}input_blocks.0.0.weight"
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def base(sd_file):
    return load_base(sd_file)


def same(one, other, parts=PARTS) -> bool:
    states = [[getattr(base, part).state_dict() for part in parts] for base in (one, other)]
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        for ours, theirs in zip(*states)
    )


def test_the_published_list_is_matched_without_rest():
    shapes = {name: tuple(shape) for name, shape in KEYS["sd_v1"].items()}
    models = make_models(WeightsFile(Path("sd-v1-4.ckpt"), shapes))
    numbers = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert numbers == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert sum(len(model.state_dict()) for model in models.values()) == len(shapes) - 1  # position_ids
    for name, model in models.items():
        found = model.config.to_dict() if name == "text_encoder" else model.config
        assert all(found[key] == value for key, value in read_config(name).items() if not key.startswith("_"))


def test_models_are_diffusers_own(base, sd_state):
    widths = {"block_out_channels": (32, 64, 128, 128)}
    unet = UNet2DConditionModel(**read_config("unet") | widths | {"cross_attention_dim": 48})
    unet.load_state_dict(convert_ldm_unet_checkpoint(sd_state, unet.config))
    vae = AutoencoderKL(**read_config("vae") | widths)
    vae.load_state_dict(convert_ldm_vae_checkpoint(sd_state, vae.config))
    sizes = read_config("text_encoder") | {"hidden_size": 48, "intermediate_size": 192}
    text_encoder = CLIPTextModel(CLIPTextConfig(**sizes)).eval()
    state = convert_ldm_clip_checkpoint(sd_state)
    state.pop("text_model.embeddings.position_ids")
    text_encoder.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in state.items()})
    assert same(base, types.SimpleNamespace(unet=unet, vae=vae, text_encoder=text_encoder))
    # As OpenAI's own tokenizer has them; the end of text is the padding too.
    tokens = [49406, 736, 7117, 593, 1395, 10763, 8291, 267, 15304, 256, 49407]
    with torch.no_grad():
        expected = text_encoder(torch.tensor([tokens + [49407] * (77 - len(tokens))])).last_hidden_state
    context = base.encode_prompts(["Red circle with light goldenrod , café !"])
    assert (context - expected).abs().max() <= 1e-4


def test_schedule_is_that_of_stable_diffusion(base):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert (base.schedule.alphas_cumprod - (1 - betas).cumprod(0)).abs().max() <= 1e-12
    assert (base.prediction, base.factor, base.unet.config.sample_size) == ("eps", 8, 64)


class ModelCheckpoint:
    """A class of a training library that is not there where files are read."""

    __module__ = "pytorch_lightning"


def like_lightning(state) -> dict:
    """What lies in `sd-v1-4.ckpt` beside the weights."""
    score = {"best_model_score": torch.tensor(0.5), "current": np.float64(0.25), "monitor": "val/loss"}
    state = {"betas": torch.rand(1000), "alphas_cumprod": torch.rand(1000)} | state
    return {"global_step": 470000, "state_dict": state, "callbacks": {ModelCheckpoint: score}}


def add_ema(state) -> dict:
    """With EMA weights that are the right ones, beside spoiled ones."""
    unet = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor for name, tensor in unet.items()}
    count = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return state | {name: tensor + 1 for name, tensor in unet.items()} | average | count


FORMS = {
    "bare": lambda state: state,
    "with the VAE's discriminator": lambda state: state | {"first_stage_model.loss.logvar": torch.zeros(())},
    "without position_ids": lambda state: {name: t for name, t in state.items() if not name.endswith("position_ids")},
    "later text model": lambda state: {n.replace(".text_model.", "."): t for n, t in state.items()},
    "EMA": add_ema,
    "wrapped": lambda state: {f"module.{name.replace(UNET, f'{UNET}_orig_mod.')}": t for name, t in state.items()},
    "with what is not needed": lambda state: (
        state
        | {name: torch.ones(2, 2) for name in (f"{UNET}out.2.lora_up.weight", "lora_unet_out.lora_down.weight")}
        | {"cond_stage_model.transformer.text_projection.weight": torch.ones(48, 48)}
    ),
    "linear attention": lambda state: {
        name: t[:, :, 0, 0] if ".attn_1." in name and t.ndim == 4 else t for name, t in state.items()
    },
}


@pytest.mark.parametrize(("form", "suffix"), [("bare", "ckpt"), *((form, "safetensors") for form in FORMS)])
def test_every_form_of_the_file(sd_state, base, tmp_path, form, suffix, monkeypatch):
    monkeypatch.setattr("common.weights.AT_ONCE", 1_000_000 if form == "bare" else 2**26)  # in pieces
    state, path = FORMS[form](sd_state), tmp_path / f"sd.{suffix}"
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    torch.save(state, path) if suffix == "ckpt" else save_file(state, path)
    assert same(load_base(path), base)


def test_half_precision_on_disk_and_in_memory(sd_state, base, tmp_path):
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": {name: t.half() if t.is_floating_point() else t for name, t in sd_state.items()}}, path)
    read = load_base(path)
    assert read.unet.dtype == torch.float32
    assert torch.equal(read.unet.conv_in.weight, base.unet.conv_in.weight.half().float())
    assert load_base(path, dtype=torch.bfloat16).unet.conv_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_a_ckpt_is_converted_once(sd_state, base, tmp_path, zipped, monkeypatch):
    path, cache = tmp_path / "sd-v1-4.ckpt", tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, ModelCheckpoint.__module__, sys.modules[__name__])
        torch.save(like_lightning(add_ema(sd_state)), path, _use_new_zipfile_serialization=zipped)
    first = load_base(path, cache=cache)
    (copy,) = cache.iterdir()
    assert copy.name.startswith("sd-v1-4-")
    assert load_file(copy).keys() == {name for name in sd_state if not name.endswith("position_ids")}
    monkeypatch.setattr(torch, "load", None)
    assert same(first, base)
    assert same(load_base(path, cache=cache), base)
    monkeypatch.undo()
    torch.save(sd_state | {FIRST: torch.zeros_like(sd_state[FIRST])}, path)
    assert load_base(path, cache=cache).unet.conv_in.weight.abs().max() == 0
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_costs_no_more_than_the_copy(sd_state, base, tmp_path, full_disk, capsys):
    torch.save(sd_state, path := tmp_path / "sd.ckpt")
    with full_disk(2**20):
        assert same(load_base(path, cache=tmp_path / "cache"), base)
    assert not list((tmp_path / "cache").iterdir())
    assert capsys.readouterr().err.startswith("warning: ")


def refuse(path, load=load_base) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


def test_missing_and_further_weights_are_named(sd_state, tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file({name: tensor for name, tensor in sd_state.items() if name != FIRST}, path)
    assert "does not fit UNet2DConditionModel: 1 missing (conv_in" in refuse(path)
    save_file(sd_state | {"first_stage_model.extra.weight": torch.zeros(1)}, path)
    assert "AutoencoderKL: 1 unexpected (extra.weight)" in refuse(path)
    for prefix in ("first_stage_model.", "cond_stage_model."):
        save_file({name: tensor for name, tensor in sd_state.items() if not name.startswith(prefix)}, path)
        assert "is Stable Diffusion v1 but lacks " in refuse(path)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
@pytest.mark.parametrize("load", [ControlNet.load, lambda path: load_base(path, cache=path.parent / "cache")])
def test_code_in_a_pickle_does_not_run(tmp_path, load, zipped):
    target, path = tmp_path / "executed", tmp_path / "sd.ckpt"
    for payload in Harmful(os.mkdir, str(target)), Harmful(eval, f"__import__('os').mkdir({str(target)!r})"):
        pickle.loads(pickle.dumps(payload))
        target.rmdir()  # the payload works
        content = {"callbacks": payload, "state_dict": {f"{UNET}x": torch.zeros(1)}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        line = refuse(path, load)
        assert f"it asks for {'eval' if payload.call[0] is eval else 'posix.mkdir'}" in line
        assert [file.name for file in tmp_path.iterdir()] == ["sd.ckpt"]


def to_ckpt(state: dict) -> bytes:
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("load", [load_base, ControlNet.load])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_truncated_files(tmp_path, load, part):
    content = to_ckpt({f"{UNET}x": torch.rand(1000)})
    (path := tmp_path / "sd.ckpt").write_bytes(content[: int(len(content) * part)])
    assert "truncated" in refuse(path, load)
    save_file({f"{UNET}x": torch.rand(1000)}, path := tmp_path / "sd.safetensors")
    path.write_bytes(path.read_bytes()[: int(4096 * part)])
    assert "not a whole safetensors file" in refuse(path, load)


V1 = {FIRST: (32, 4, 3, 3), CONTEXT: (32, 48)}
OTHERS = {
    "Stable Diffusion v2": {"cond_stage_model.model.ln_final.weight": (4,), **V1},
    "Stable Diffusion v2,": V1 | {CONTEXT: (32, 1024)},
    "Stable Diffusion XL": {"conditioner.embedders.1.model.ln_final.weight": (4,), **V1},
    "Stable Diffusion 3": {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
    "Stable Diffusion v1 for inpainting": V1 | {FIRST: (32, 9, 3, 3)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (4, 4)},
    "a ControlNet": {"control_model.zero_convs.0.0.weight": (4, 4, 1, 1)},
    "a ControlNet, ": {"controlnet_mid_block.weight": (4, 4, 1, 1), "conv_in.weight": (4, 4, 3, 3)},
    "a LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 4)},
    "one model of a diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": (4, 4)},
    "a VAE": {"encoder.conv_in.weight": (4, 3, 3, 3)},
    "no model that is known here (its first weight is fc.weight)": {"fc.weight": (4, 4)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_told_by_name(tmp_path, kind):
    state = {name: torch.zeros(shape) for name, shape in OTHERS[kind].items()}
    save_file(state, path := tmp_path / "some.safetensors")
    line = refuse(path)
    assert f"is {kind.rstrip(', ')}, not Stable Diffusion v1; " in line
    assert ("--controlnet" in line) == ("ControlNet" in kind)
    if "ControlNet" not in kind:
        assert f"is {kind.rstrip(', ')}, not a ControlNet; " in refuse(path, ControlNet.load)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_half_a_clip_folder_is_refused(lost, clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / lost).unlink()
    assert "not a CLIP folder" in refuse(folder, Clip)


def test_a_base_is_no_controlnet(sd_file, tmp_path):
    assert "is Stable Diffusion v1, not a ControlNet" in refuse(sd_file, ControlNet.load)
    save_tensors(path := tmp_path / "digits.safetensors", {"x": torch.zeros(1)}, {"kind": "ContextUNet", "config": {}})
    assert "is a ContextUNet of this project, not Stable Diffusion v1" in refuse(path)

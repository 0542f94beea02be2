"""Files that are not what they should be: each gets one line that says what it is, and no code of theirs runs."""

import io
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import save_tensors
from common.cli import UserError
from latent_diffusion.base import load_base
from p3_controlnet.model import ControlNet

UNET = "model.diffusion_model."
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(path, load=load_base) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
@pytest.mark.parametrize("load", [load_base, ControlNet.load])
def test_code_in_a_pickle_does_not_run(tmp_path, load, zipped):
    target = tmp_path / "executed"
    payloads = Harmful(os.mkdir, str(target)), Harmful(eval, f"__import__('os').mkdir({str(target)!r})")
    for payload in payloads:
        pickle.loads(pickle.dumps(payload))
        assert target.exists()  # the payload works
        target.rmdir()
        path = tmp_path / "sd.ckpt"
        content = {"callbacks": payload, "state_dict": {f"{UNET}x": torch.zeros(1)}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        line = refused(path, load)
        assert f"it asks for {'eval' if payload.call[0] is eval else 'posix.mkdir'}" in line
        assert "it was not read" in line
        assert not target.exists()


def test_cached_copies_are_of_harmless_files_only(tmp_path):
    torch.save({"state_dict": Harmful(os.mkdir, str(tmp_path / "executed"))}, path := tmp_path / "sd.ckpt")
    with pytest.raises(UserError, match=r"posix.mkdir"):
        load_base(path, cache=tmp_path / "cache")
    assert [file.name for file in tmp_path.iterdir()] == ["sd.ckpt"]


def saved(state: dict) -> bytes:
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("load", [load_base, ControlNet.load])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_truncated_ckpt(tmp_path, load, part):
    content = saved({f"{UNET}x": torch.rand(1000)})
    (path := tmp_path / "sd.ckpt").write_bytes(content[: int(len(content) * part)])
    assert "truncated" in refused(path, load)


@pytest.mark.parametrize("load", [load_base, ControlNet.load])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_truncated_safetensors(tmp_path, load, part):
    save_file({f"{UNET}x": torch.rand(1000)}, path := tmp_path / "sd.safetensors")
    path.write_bytes(path.read_bytes()[: int(4096 * part)])
    assert "not a whole safetensors file" in refused(path, load)


V1 = {f"{UNET}input_blocks.0.0.weight": (32, 4, 3, 3), CONTEXT: (32, 48)}
OTHERS = {
    "Stable Diffusion v2": {"cond_stage_model.model.ln_final.weight": (4,), **V1},
    "Stable Diffusion v2,": V1 | {CONTEXT: (32, 1024)},
    "Stable Diffusion XL": {"conditioner.embedders.1.model.ln_final.weight": (4,), **V1},
    "Stable Diffusion 3": {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
    "Stable Diffusion v1 for inpainting": V1 | {f"{UNET}input_blocks.0.0.weight": (32, 9, 3, 3)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (4, 4)},
    "a ControlNet": {"control_model.zero_convs.0.0.weight": (4, 4, 1, 1)},
    "a ControlNet, ": {"controlnet_mid_block.weight": (4, 4, 1, 1), "conv_in.weight": (4, 4, 3, 3)},
    "a LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 4)},
    "one model of a diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": (4, 4)},
    "a VAE": {"encoder.conv_in.weight": (4, 3, 3, 3)},
    "no model that is known here (its first weight is fc.weight)": {"fc.weight": (4, 4)},
}


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_told_by_name(tmp_path, kind, suffix):
    state, path = {name: torch.zeros(shape) for name, shape in OTHERS[kind].items()}, tmp_path / f"some.{suffix}"
    torch.save(state, path) if suffix == "ckpt" else save_file(state, path)
    line = refused(path)
    assert f"is {kind.rstrip(', ')}, not Stable Diffusion v1; " in line
    assert ("--controlnet" in line) == ("ControlNet" in kind)
    if "ControlNet" not in kind:
        assert f"is {kind.rstrip(', ')}, not a ControlNet; " in refused(path, ControlNet.load)


def test_a_base_is_no_controlnet(sd_file):
    assert "is Stable Diffusion v1, not a ControlNet" in refused(sd_file, ControlNet.load)


def test_our_own_other_models_are_told_by_name(tmp_path):
    save_tensors(path := tmp_path / "digits.safetensors", {"x": torch.zeros(1)}, {"kind": "ContextUNet", "config": {}})
    assert "is a ContextUNet of this project, not Stable Diffusion v1" in refused(path)


@pytest.mark.parametrize("missing", ["first_stage_model.", "cond_stage_model."])
def test_a_file_without_vae_or_text_encoder(sd_state, tmp_path, missing):
    state = {name: tensor for name, tensor in sd_state.items() if not name.startswith(missing)}
    save_file(state, path := tmp_path / "sd.safetensors")
    assert "is Stable Diffusion v1 but lacks " in refused(path)


@pytest.mark.parametrize("content", [{}, [], {"state_dict": None}, torch.zeros(3), {"epoch": 1}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, path := tmp_path / "sd.ckpt")
    assert "holds no named tensors" in refused(path)


@pytest.mark.parametrize("load", [load_base, ControlNet.load])
def test_nothing_there(tmp_path, load):
    assert "no such file" in refused(tmp_path / "absent.ckpt", load)

"""ControlNets in the original layout: read and written, and found where a student leaves them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from common.cli import UserError
from latent_diffusion.files import WeightsFile, controlnet_sizes, find_controlnet
from p3_controlnet import export, sample
from p3_controlnet.model import ControlNet, ControlNetConfig
from tests.stable_diffusion import KEYS


@pytest.fixture(scope="module")
def theirs(control_state) -> ControlNetModel:
    """diffusers' ControlNet with diffusers' conversion of the same weights."""
    model = ControlNetModel(block_out_channels=(32, 64, 128, 128), cross_attention_dim=48).eval()
    model.load_state_dict(convert_controlnet_checkpoint(control_state, model.config))
    return model


def same(tensors, expected):
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


def export_to(out, source, *flags):
    return export.main(export.parse_arguments([str(source), str(out), *flags]))


def test_the_published_list_is_matched_without_rest():
    file = WeightsFile(Path("control.pth"), {name: tuple(shape) for name, shape in KEYS["controlnet"].items()})
    weights = find_controlnet(file)
    assert ControlNetConfig(**controlnet_sizes(weights)) == ControlNetConfig()
    assert len(weights.stored) == len(file.shapes)


FORMS = {
    "original": lambda state: state,
    "without prefix": lambda state: {name.removeprefix("control_model."): tensor for name, tensor in state.items()},
    "wrapped": lambda state: {name.replace(".", "._orig_mod.module.", 1): tensor for name, tensor in state.items()},
    "with the whole base": lambda state: state | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_original_layout(control_state, theirs, tmp_path, form, suffix):
    state, path = FORMS[form](control_state), tmp_path / f"control.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    ours, about = ControlNet.load(path)
    assert (about, ours.training) == ({}, False)
    assert same(ours.state_dict(), theirs.state_dict())
    assert all(parameter.requires_grad for parameter in ours.parameters()), "it can be trained on"


def test_exports_are_what_others_read(control_file, control_state, theirs, tmp_path):
    folder = export_to(tmp_path / "folder", control_file, "--layout", "diffusers", "--fp32")
    assert same(ControlNetModel.from_pretrained(folder).state_dict(), theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    one_file, _ = ControlNet.load(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    assert same(one_file.state_dict(), theirs.state_dict())
    file = export_to(tmp_path / "new" / "control.safetensors", folder, "--fp32")
    assert same(load_file(file), control_state)
    assert {tensor.dtype for tensor in load_file(export_to(file, folder)).values()} == {torch.float16}


def test_what_cannot_be_exported_is_told(controlnet_folder, control_file, tmp_path):
    with pytest.raises(UserError, match=r"built unlike Stable Diffusion v1; add --layout diffusers"):
        export_to(tmp_path / "control.safetensors", controlnet_folder)
    with pytest.raises(UserError, match=r"name a .safetensors file"):
        export_to(tmp_path / "folder", control_file)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is a file; name a folder"):
        export_to(tmp_path / "file", control_file, "--layout", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def draw(sd_state, hint_folder, tmp_path, monkeypatch):
    """A function that draws one small picture with a `.ckpt` that lies alone in a folder; returns its pixels."""
    (tmp_path / "sd").mkdir()
    torch.save({"state_dict": sd_state}, path := tmp_path / "sd" / "sd-v1-4.ckpt")
    table = hint_folder / "one.json"
    table.write_text((hint_folder / "prompt.json").read_text().splitlines()[0])
    monkeypatch.setattr(sample, "OWN_CONTROLNET", tmp_path / "checkpoints" / "controlnet_sd.safetensors")

    def run(*flags):
        places = [table, hint_folder / "source", tmp_path / "out", path, "--cache-dir", tmp_path / "cache"]
        flags = [*places, "--size", 64, "--steps", 2, "--precision", "fp32", *flags]
        (file,) = sample.main(sample.parse_arguments([str(flag) for flag in flags]))
        return np.asarray(Image.open(file))

    return run


def test_the_students_controlnet_is_found_else_the_line_says_where_it_should_be(
    draw, control_state, control_file, tmp_path
):
    with pytest.raises(UserError, match=f"{tmp_path}/sd/sd-v1-4.ckpt.*checkpoints/controlnet_sd.safetensors"):
        draw()
    assert not (tmp_path / "out").exists()
    named = draw("--controlnet", control_file)
    assert [path.name.startswith("sd-v1-4-") for path in (tmp_path / "cache").iterdir()] == [True]
    (tmp_path / "checkpoints").mkdir()
    save_file(control_state, tmp_path / "checkpoints" / "controlnet_sd.safetensors")
    assert np.array_equal(draw(), named)
    (tmp_path / "checkpoints" / "controlnet_sd.safetensors").rename(tmp_path / "sd" / "controlnet_sd.safetensors")
    assert np.array_equal(draw(), named)
    assert not np.array_equal(draw("--control-scale", "0"), named)


def test_one_file_with_both_is_either_and_a_trained_decoder_is_not_dropped_silently(
    draw, sd_state, control_state, control_file, tmp_path, capsys
):
    expected = draw("--controlnet", control_file)
    torch.save({"state_dict": sd_state | control_state}, both := tmp_path / "both.ckpt")
    assert np.array_equal(draw("--controlnet", both), expected)
    assert "warning" not in capsys.readouterr().err
    decoder = {name: t + 1e-4 for name, t in sd_state.items() if ".output_blocks.11.1.proj" in name}
    torch.save({"state_dict": sd_state | control_state | decoder}, both)
    assert np.array_equal(draw("--controlnet", both), expected)
    assert f"{both}: {len(decoder)} of its U-Net's weights are not the base's" in capsys.readouterr().err
    both.replace(tmp_path / "sd" / "sd-v1-4.ckpt")
    assert not np.array_equal(draw("--controlnet", tmp_path / "sd" / "sd-v1-4.ckpt"), expected)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["bin", "fp16"])
@pytest.mark.parametrize("place", [".", "snapshots/0123abc", "controlnet"])
def test_folders_of_diffusers_training_and_of_the_hub_are_read(controlnet_folder, tmp_path, place, form):
    (tmp_path / "snapshots").mkdir()
    shutil.copytree(controlnet_folder, tmp_path / place, dirs_exist_ok=True)
    file = tmp_path / place / "diffusion_pytorch_model.safetensors"
    if form == "fp16":
        file.rename(file.with_suffix(".fp16.safetensors"))
    else:
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    found, expected = ControlNet.load(tmp_path)[0], ControlNet.load(controlnet_folder)[0]
    assert same(found.state_dict(), expected.state_dict())


def test_the_controlnets_own_guidance_is_the_default(pipeline_folder, controlnet_folder, tmp_path):
    ControlNet.load(controlnet_folder)[0].save(tmp_path / "own", {"guidance_scale": 3.0})
    for folder, flags, expected in (
        (controlnet_folder, [], 7.5),
        (tmp_path / "own", [], 3.0),
        (tmp_path / "own", ["--guidance-scale", "1"], 1.0),
    ):
        arguments = ["prompt.json", "source", "out", str(pipeline_folder), "--controlnet", str(folder), *flags]
        _, options = sample.load_sampler(sample.parse_arguments(arguments))
        assert options.scale == expected

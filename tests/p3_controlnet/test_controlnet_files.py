"""ControlNets in the original layout: read and written, and found where a student leaves them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from common.cli import UserError
from latent_diffusion.base import load_base
from latent_diffusion.files import WeightsFile, controlnet_sizes, find_controlnet
from p3_controlnet import export, sample
from p3_controlnet.config import ControlNetConfig
from p3_controlnet.model import ControlNet, check_fit
from tests.stable_diffusion import KEYS


@pytest.fixture(scope="module")
def theirs(control_state) -> ControlNetModel:
    """diffusers' ControlNet with diffusers' conversion of the same weights."""
    model = ControlNetModel(block_out_channels=(32, 64, 128, 128), cross_attention_dim=48).eval()
    model.load_state_dict(convert_controlnet_checkpoint(control_state, model.config))
    return model


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
    "with the whole base": lambda state: state | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_original_layout(control_state, theirs, tmp_path, form, suffix):
    state, path = FORMS[form](control_state), tmp_path / f"control.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    ours, about = ControlNet.load(path)
    assert about == {}
    assert not ours.training
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_one_file_of_diffusers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, _ = ControlNet.load(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@torch.no_grad()
def test_residuals_are_diffusers(control_file, sd_file, theirs):
    ours, _ = ControlNet.load(control_file)
    check_fit(ours, load_base(sd_file), "here")
    generator = torch.Generator().manual_seed(0)
    xt, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 801])
    context, hint = torch.randn(2, 77, 48, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)
    down, middle = theirs(xt, t, context, hint, return_dict=False)
    residuals = ours(xt, t, context, hint)
    assert middle.std() > 0.1
    assert max(float((one - other).abs().max()) for one, other in zip(residuals, [*down, middle], strict=True)) <= 1e-4


def test_it_can_be_trained_on(control_file):
    controlnet, _ = ControlNet.load(control_file)
    assert all(parameter.requires_grad for parameter in controlnet.parameters())


def test_exports_are_what_others_read(control_file, control_state, theirs, tmp_path):
    folder = export_to(tmp_path / "folder", control_file, "--layout", "diffusers", "--fp32")
    read = ControlNetModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in read.items())
    file = export_to(tmp_path / "new" / "control.safetensors", folder, "--fp32")
    again = load_file(file)
    assert again.keys() == control_state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in control_state.items())
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


def test_the_students_controlnet_is_found(draw, control_state, control_file, tmp_path):
    named = draw("--controlnet", control_file)
    assert [path.name.startswith("sd-v1-4-") for path in (tmp_path / "cache").iterdir()] == [True]
    (tmp_path / "out" / "0.png").unlink()
    (tmp_path / "checkpoints").mkdir()
    save_file(control_state, tmp_path / "checkpoints" / "controlnet_sd.safetensors")
    assert np.array_equal(draw(), named)
    (tmp_path / "checkpoints" / "controlnet_sd.safetensors").rename(tmp_path / "sd" / "controlnet_sd.safetensors")
    assert np.array_equal(draw(), named)
    assert not np.array_equal(draw("--control-scale", "0"), named)


def test_without_one_the_line_says_where_and_how(draw, tmp_path):
    with pytest.raises(UserError) as caught:
        draw()
    line = str(caught.value)
    assert "\n" not in line
    for part in (tmp_path / "sd" / "sd-v1-4.ckpt", "checkpoints/controlnet_sd.safetensors", "--controlnet", "train.py"):
        assert str(part) in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_the_place_is_in_the_repository():
    root = Path(sample.__file__).resolve().parent.parent
    assert root / "checkpoints" / "controlnet_sd.safetensors" == sample.OWN_CONTROLNET


def test_the_controlnets_own_guidance_is_the_default(pipeline_folder, controlnet_folder, tmp_path):
    controlnet, _ = ControlNet.load(controlnet_folder)
    controlnet.save(tmp_path / "own", {"guidance_scale": 3.0})
    for folder, flags, expected in (
        (controlnet_folder, [], 7.5),
        (tmp_path / "own", [], 3.0),
        (tmp_path / "own", ["--guidance-scale", "1"], 1.0),
    ):
        arguments = ["prompt.json", "source", "out", str(pipeline_folder), "--controlnet", str(folder), *flags]
        assert sample.sampler_from(sample.parse_arguments(arguments)).options.guidance_scale == expected

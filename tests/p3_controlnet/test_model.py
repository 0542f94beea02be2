"""Our ControlNet against diffusers' `ControlNetModel`: names, residuals, and files of every layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file, save_file

from common.cli import UserError
from latent_diffusion.files import WeightsFile, controlnet_sizes, find_controlnet
from p3_controlnet import sample
from p3_controlnet.model import ControlNet, ControlNetConfig
from tests.programs import parse, read, run
from tests.stable_diffusion import KEYS


def test_the_default_is_stable_diffusions_controlnet():
    with torch.device("meta"):
        ours, theirs = ControlNet(ControlNetConfig()), ControlNetModel(cross_attention_dim=768)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 361_279_120


def test_a_new_one_copies_the_frozen_unet_in_fp32_and_trains(unet):
    controlnet = ControlNet.from_unet(unet.to(torch.bfloat16))
    weights, frozen = dict(controlnet.named_parameters()), dict(unet.named_parameters())
    copied = [name for name in weights if not name.startswith("controlnet_")]
    assert len(copied) > 50
    assert all(torch.equal(weights[name], frozen[name].float()) for name in copied)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in weights.values())
    assert not any(parameter.requires_grad for parameter in frozen.values())


@torch.no_grad()
@pytest.mark.parametrize("written_by", ["us", "diffusers"])
def test_each_reads_what_the_other_wrote_and_the_residuals_agree(unet, controlnet, batch, tmp_path, written_by):
    if written_by == "us":
        controlnet.save(tmp_path, {"step": 12}, fp16=False)
        ours, theirs = controlnet, ControlNetModel.from_pretrained(tmp_path)
    else:
        theirs = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 8, 10))
        theirs.load_state_dict(controlnet.state_dict())
        theirs.save_pretrained(tmp_path)
        ours, about = ControlNet.load(tmp_path)
        assert (about, ours.training) == ({}, False)
    skips, middle = theirs(batch["xt"], batch["t"], batch["context"], batch["hint"], return_dict=False)
    for one, other in zip(ours(**batch), [*skips, middle], strict=True):
        assert (one - other).abs().max() < 1e-5
        assert one.abs().max() > 0.01


@pytest.mark.parametrize("place", ["", "diffusion_pytorch_model.safetensors"])
def test_saving_keeps_half_precision_and_the_facts(controlnet, tmp_path, place):
    controlnet.save(tmp_path, {"step": 12, "figures": {"iou": 0.97}})
    loaded, about = ControlNet.load(tmp_path / place)
    assert (about["step"], about["figures"], about["kind"]) == (12, {"iou": 0.97}, "ControlNet")
    assert loaded.config == controlnet.config
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


def change_config(folder, **facts):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), ": has no config.json, but diffusion_py"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: no ControlNet's config"),
        (lambda folder: change_config(folder, _class_name="AutoencoderKL"), "describes a AutoencoderKL"),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "no such weights file"),
        (lambda folder: change_config(folder, global_pool_conditions=True), "global_pool_conditions is True"),
        (lambda folder: change_config(folder, layers_per_block=1), "does not fit ControlNet"),
    ],
)
def test_bad_folders_are_one_clear_line(controlnet, tmp_path, refusal, spoil, complaint):
    controlnet.save(tmp_path, {})
    spoil(tmp_path)
    line = refusal(ControlNet.load, tmp_path)
    assert line.startswith(str(tmp_path))
    assert complaint in line


def test_another_kind_of_unet_is_refused():
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, num_class_embeds=3)
    with pytest.raises(UserError, match="num_class_embeds is 3"):
        ControlNet.from_unet(unet)


@pytest.fixture(scope="module")
def theirs(control_state) -> ControlNetModel:
    """diffusers' ControlNet with diffusers' conversion of the same weights."""
    model = ControlNetModel(block_out_channels=(32, 64, 128, 128), cross_attention_dim=48).eval()
    model.load_state_dict(convert_controlnet_checkpoint(control_state, model.config))
    return model


def same(tensors, expected):
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


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


def test_a_folder_is_also_diffusers_and_its_file_alone_is_enough(control_file, theirs, tmp_path):
    ControlNet.load(control_file)[0].save(tmp_path / "ours", {}, fp16=False)
    assert same(ControlNetModel.from_pretrained(tmp_path / "ours").state_dict(), theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        alone, _ = ControlNet.load(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        assert same(alone.state_dict(), theirs.state_dict())


@pytest.fixture
def draw(sd_state, hint_folder, tmp_path, monkeypatch):
    """A function that draws one small picture with a `.ckpt` that lies alone in a folder; returns its pixels."""
    (tmp_path / "sd").mkdir()
    torch.save({"state_dict": sd_state}, path := tmp_path / "sd" / "sd-v1-4.ckpt")
    table = hint_folder / "one.json"
    table.write_text((hint_folder / "prompt.json").read_text().splitlines()[0])
    monkeypatch.setattr(sample, "OWN_CONTROLNET", tmp_path / "checkpoints" / "controlnet_sd.safetensors")

    def drawn(*flags):
        places = [table, hint_folder / "source", tmp_path / "out", path, "--cache-dir", tmp_path / "cache"]
        (file,) = run(sample, *places, "--size", 64, "--steps", 2, "--precision", "fp32", *flags)
        return read(file)

    return drawn


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


@pytest.mark.parametrize("place", [".", "snapshots/0123abc", "controlnet"])
def test_folders_of_diffusers_training_and_of_the_hub_are_read(controlnet_folder, tmp_path, place):
    (tmp_path / "snapshots").mkdir()
    shutil.copytree(controlnet_folder, tmp_path / place, dirs_exist_ok=True)
    file = tmp_path / place / "diffusion_pytorch_model.safetensors"
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
        arguments = ["prompt.json", "source", "out", pipeline_folder, "--controlnet", folder, "--precision", "bf16"]
        sampler, options = sample.load_sampler(parse(sample, *arguments, *flags))
        assert (options.scale, sampler.base.unet.dtype) == (expected, torch.bfloat16)

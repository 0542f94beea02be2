"""Our ControlNet against diffusers' `ControlNetModel`: names, residuals, files."""

import json

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from common.cli import UserError
from p3_controlnet.model import ControlNet, ControlNetConfig


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


@torch.no_grad()
@pytest.mark.parametrize("widths", [(8,), (4, 8, 12), (4, 6, 8, 10, 12)], ids=len)
def test_hints_of_other_factors(unet, widths):
    controlnet = ControlNet.from_unet(unet, widths)
    factor = controlnet.config.hint_factor
    assert factor == 2 ** (len(widths) - 1)
    assert controlnet.encode_hint(torch.rand(2, 3, 8 * factor, 8 * factor)).shape == (2, 16, 8, 8)


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
def test_bad_folders_are_one_clear_line(controlnet, tmp_path, spoil, complaint):
    controlnet.save(tmp_path, {})
    spoil(tmp_path)
    with pytest.raises(UserError, match=complaint) as caught:
        ControlNet.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_another_kind_of_unet_is_refused():
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, num_class_embeds=3)
    with pytest.raises(UserError, match="num_class_embeds is 3"):
        ControlNet.from_unet(unet)

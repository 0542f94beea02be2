"""Our ControlNet against diffusers' `ControlNetModel`: names, residuals, files."""

import json

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from common.checkpoint import load_about
from common.cli import UserError
from p3_controlnet.config import ControlNetConfig
from p3_controlnet.model import ControlNet

HINT_CHANNELS = (4, 6, 8, 10)


def largest_difference(ours, theirs):
    """Over all residuals of two ControlNets."""
    skips, middle = theirs
    return max((a - b).abs().max() for a, b in zip(ours, [*skips, middle], strict=True))


def call_theirs(network, batch, **options):
    return network(batch["xt"], batch["t"], batch["context"], batch["hint"], return_dict=False, **options)


def test_the_default_is_stable_diffusions_controlnet():
    with torch.device("meta"):
        ours, theirs = ControlNet(ControlNetConfig()), ControlNetModel(cross_attention_dim=768)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 361_279_120
    assert all(tensor.is_meta for tensor in ours.state_dict().values())
    assert ours.residual_count == 13


def test_a_new_one_copies_the_frozen_unet_and_trains(unet, untrained):
    copied = [name for name, _ in untrained.named_parameters() if not name.startswith("controlnet_")]
    weights, frozen = dict(untrained.named_parameters()), dict(unet.named_parameters())
    assert len(copied) > 50
    for name in copied:
        assert torch.equal(weights[name], frozen[name])
        assert weights[name].data_ptr() != frozen[name].data_ptr()
    assert all(parameter.requires_grad for parameter in weights.values())
    assert not any(parameter.requires_grad for parameter in frozen.values())


def test_a_half_precision_unet_is_copied_in_fp32(unet):
    controlnet = ControlNet.from_unet(unet.to(torch.bfloat16), HINT_CHANNELS)
    assert {parameter.dtype for parameter in controlnet.parameters()} == {torch.float32}


def test_what_diffusers_makes_of_a_unet_is_what_we_make(unet, untrained):
    theirs = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    ours = {name: tensor.shape for name, tensor in untrained.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in theirs.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_diffusers_reads_our_folder_and_agrees(controlnet, batch, tmp_path, scale):
    controlnet.save(tmp_path, {"step": 12}, fp16=False)
    theirs = ControlNetModel.from_pretrained(tmp_path)
    ours = controlnet(**batch, scale=scale)
    assert largest_difference(ours, call_theirs(theirs, batch, conditioning_scale=scale)) < 1e-5
    assert min(residual.abs().max() for residual in ours) > 0.01


@torch.no_grad()
def test_we_read_diffusers_folder_and_agree(unet, controlnet, batch, tmp_path):
    theirs = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    theirs.load_state_dict(controlnet.state_dict())
    theirs.save_pretrained(tmp_path)
    ours, about = ControlNet.load(tmp_path)
    assert (about, ours.training) == ({}, False)
    assert largest_difference(ours(**batch), call_theirs(theirs, batch)) < 1e-5


def test_saving_keeps_half_precision_and_the_facts(controlnet, tmp_path):
    controlnet.save(tmp_path / "new", {"step": 12, "figures": {"iou": 0.97}})
    loaded, about = ControlNet.load(tmp_path / "new")
    assert (about["step"], about["figures"]) == (12, {"iou": 0.97})
    assert about["kind"] == load_about(tmp_path / "new" / "diffusion_pytorch_model.safetensors")["kind"] == "ControlNet"
    assert loaded.config == controlnet.config
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_one_weights_file_is_enough(controlnet, tmp_path):
    controlnet.save(tmp_path, {})
    loaded, _ = ControlNet.load(tmp_path / "diffusion_pytorch_model.safetensors")
    assert loaded.config == controlnet.config


@torch.no_grad()
def test_a_scale_for_every_residual(controlnet, batch):
    scales = [k / 10 for k in range(controlnet.residual_count)]
    for plain, scaled, scale in zip(controlnet(**batch), controlnet(**batch, scale=scales), scales, strict=True):
        assert torch.equal(scaled, plain * scale)
    with pytest.raises(ValueError, match="zip"):
        controlnet(**batch, scale=[1.0])


@torch.no_grad()
@pytest.mark.parametrize("widths", [(8,), (4, 8, 12), (4, 6, 8, 10, 12)], ids=len)
def test_hints_of_other_factors(unet, batch, widths):
    controlnet = ControlNet.from_unet(unet, widths)
    factor = controlnet.config.hint_factor
    assert factor == 2 ** (len(widths) - 1)
    assert controlnet.encode_hint(torch.rand(2, 3, 8 * factor, 8 * factor)).shape == (2, 16, 8, 8)


def test_a_config_survives_json(controlnet):
    text = json.dumps(controlnet.config.__dict__)
    assert ControlNetConfig(**json.loads(text)) == controlnet.config


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not a JSON file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "describes a None"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}'), "AutoencoderKL"),
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
    assert "\n" not in str(caught.value)


def change_config(folder, **facts):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_another_kind_of_unet_is_refused():
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, num_class_embeds=3)
    with pytest.raises(UserError, match="num_class_embeds is 3"):
        ControlNet.from_unet(unet)

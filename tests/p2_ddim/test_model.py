"""The face U-Net against the course's list of weights and against its description, layer by layer."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.checkpoint import save_tensors
from p2_ddim.model import COURSE, FaceUNet, FaceUNetConfig, load_face_unet

CONTRACT = json.loads((Path(__file__).parent / "face_unet_keys.json").read_text())


def reference(state, x, t):
    """The course's network as its description says, layer by layer, with nothing from the code under test."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"])

    def resblock(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = h + linear(f"{name}.time.1", F.silu(time))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in state else x)

    def attention(name, x):
        n, c, height, width = x.shape
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm", x))
        q, k, v = (part.reshape(n, c, height * width) for part in qkv.split(c, dim=1))
        weights = (torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(c)).softmax(dim=2)
        mixed = torch.einsum("nqk,nck->ncq", weights, v).reshape(n, c, height, width)
        return x + conv(f"{name}.out", mixed)

    def block(name, x):
        x = resblock(f"{name}.resblocks", x)
        return attention(f"{name}.attention", x) if f"{name}.attention.qkv.weight" in state else x

    i = torch.arange(64, dtype=x.dtype)
    angles = t.to(x.dtype)[:, None] * torch.exp(-math.log(10000) * 2 * i / 128)
    time = linear("time.3", F.silu(linear("time.1", torch.cat([angles.sin(), angles.cos()], dim=1))))
    skips = []
    for number in range(1, 19):
        if number == 1:
            x = conv("down1", x, padding=1)
        elif number in (4, 7, 10, 13, 16):
            x = conv(f"down{number}.0", x, stride=2, padding=1)
        else:
            x = block(f"down{number}", x)
        skips.append(x)
    x = block("mid2", block("mid1", x))
    for number in range(1, 24):
        if number in (4, 8, 12, 16, 20):
            x = conv(f"up{number}.1", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), padding=1)
        else:
            x = block(f"up{number}", torch.cat([x, skips.pop()], dim=1))
    return conv("out.2", F.silu(norm("out.0", x)), padding=1)


def test_keys_and_shapes_are_the_courses():
    with torch.device("meta"):
        model = FaceUNet()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == CONTRACT
    assert len(CONTRACT) == 427
    assert sum(parameter.numel() for parameter in model.parameters()) == 113_673_219


def test_forward_is_what_the_course_describes(course_model):
    with torch.device("meta"):
        model = FaceUNet().double()
    model.to_empty(device="cpu").load_state_dict(course_model.state_dict())
    # The description's frequencies, not their fp32 roundings.
    frequencies = torch.exp(-math.log(10000) * 2 * torch.arange(64, dtype=torch.float64) / 128)
    assert (course_model.time[0].inv_freq.double() - frequencies).abs().max() < 1e-7
    model.time[0].inv_freq.copy_(frequencies)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 32, 64, generator=generator, dtype=torch.float64)
    t = torch.tensor([981, 21])
    with torch.no_grad():
        ours, theirs = model(x, t), reference(model.state_dict(), x, t)
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize(
    "config",
    [
        FaceUNetConfig(widths=(8,), attention=(True,), middle_attention=(), embedding=8),
        FaceUNetConfig(widths=(8, 12, 24), attention=(0, 1, 0), blocks=3, embedding=8),
        FaceUNetConfig(widths=(6, 16), attention=(0, 1), patch_size=4, blocks=1, embedding=8, dropout=0.1),
    ],
)
def test_any_width_depth_and_size_starts_with_zeros(config):
    model = FaceUNet(config)
    assert FaceUNetConfig(**json.loads(json.dumps(asdict(config)))) == config
    xt = torch.randn(2, 3, 2 * config.stride, config.stride)
    output = model(xt, torch.tensor([0, 999]))
    assert output.shape == xt.shape
    assert not output.any()


def test_the_means_of_folded_channels_reach_the_output():
    """GroupNorm with one group of a channel or two takes them away; a linear map of them is a closed form."""
    torch.manual_seed(3)
    config = FaceUNetConfig(widths=(8, 16), attention=(0, 0), patch_size=2, blocks=1, embedding=8, means=True)
    model, xt, t = FaceUNet(config), torch.randn(2, 3, 8, 8), torch.tensor([5, 700])
    assert not model(xt, t).any()
    torch.nn.init.normal_(model.means.weight)
    maps = (model.time(t) @ model.means.weight.T).reshape(2, 12, 12)
    phases = torch.stack([xt[:, c, i::2, j::2] for c in range(3) for i in (0, 1) for j in (0, 1)], dim=1)
    expected = (maps @ phases.mean((2, 3))[..., None])[..., 0]
    for k, (c, i, j) in enumerate((c, i, j) for c in range(3) for i in (0, 1) for j in (0, 1)):
        assert (model(xt, t)[:, c, i::2, j::2] - expected[:, k, None, None]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["UNet.pt", "UNet.safetensors"])
def test_bare_weights_get_the_courses_facts(tmp_path, name, monkeypatch, narrow_model):
    monkeypatch.setitem(COURSE, "config", asdict(narrow_model.config))
    wrapped = {f"module.{key}": tensor.half() for key, tensor in narrow_model.state_dict().items()}
    path = tmp_path / name
    torch.save(wrapped, path) if path.suffix == ".pt" else save_tensors(path, wrapped, {})
    model, about = load_face_unet(path)
    assert about["prediction"] == "eps"
    assert about["schedule"] == {"name": "linear", "T": 1000, "beta_start": 1e-4, "beta_end": 2e-2}
    assert not model.training
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, narrow_model.state_dict()[key].half().float())

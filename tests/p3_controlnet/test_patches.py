"""Patches against the plain call, and against what averaging must do."""

import pytest
import torch

from p3_controlnet.unet import ControlledUNet, in_patches, starts


def inputs(height, width):
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(2, 4, height, width, generator=generator)
    return xt, torch.tensor([3, 5]), torch.randn(2, 1, 4, height, width, generator=generator)


def pointwise(xt, t, features, context):
    """A network in which no position sees another, so that patches must not matter."""
    return xt.sin() * t[:, None, None, None] + features[:, 0] * context[:, :1, None, None]


@pytest.mark.parametrize(
    ("length", "patch", "stride", "expected"),
    [(16, 16, 8, [0]), (24, 16, 8, [0, 8]), (30, 16, 8, [0, 8, 14]), (9, 16, 8, [0]), (17, 16, 16, [0, 1])],
)
def test_patches_cover_a_side(length, patch, stride, expected):
    assert starts(length, patch, stride) == expected


@pytest.mark.parametrize("stride", [1, 5, 8])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (19, 8), (24, 21), (5, 30)])
def test_a_pointwise_network_gives_what_it_gives_without_patches(height, width, stride):
    """Which holds only if the patches are cut alike, laid back in place, and weighed so that they sum to one."""
    xt, t, features = inputs(height, width)
    condition = {"features": features, "context": torch.tensor([[2.0, 3.0], [4.0, 5.0]])}
    ours = in_patches(pointwise, patch=8, stride=stride, cut=("features",))(xt, t, **condition)
    assert (ours - pointwise(xt, t, **condition)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 12])
def test_one_patch_is_the_plain_call(unet, controlnet, batch, patch):
    network = ControlledUNet(unet, [controlnet])
    features = network.encode_hint(batch["hint"])
    plain = network(batch["xt"], batch["t"], batch["context"], features=features)
    patched = in_patches(network, patch, stride=4, cut=("features",))
    assert torch.equal(patched(batch["xt"], batch["t"], context=batch["context"], features=features), plain)


def test_no_seams():
    """Each patch answers with a level of its own; from one to the next it changes gradually."""
    levels = iter([0.0, 1.0])
    patched = in_patches(lambda xt, t: torch.full_like(xt, next(levels)), 16, 8, cut=())
    result = patched(torch.zeros(1, 1, 16, 24), torch.zeros(1))[0, 0, 0]
    assert result[:8].eq(0).all()
    assert result[16:].eq(1).all()
    assert (result.diff() >= 0).all()
    assert result.diff().max() < 0.25

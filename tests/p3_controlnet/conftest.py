"""A small U-Net with every part of Stable Diffusion's, and ControlNets for it."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from p3_controlnet.model import ControlNet

HINT_CHANNELS = (4, 6, 8, 10)


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module in eval mode with all parameters drawn anew, the zero convolutions' too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    """Two levels, the first with cross-attention, 4x8x8 latents, contexts of width 16; frozen."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return randomised(unet, seed).requires_grad_(False)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def untrained(unet) -> ControlNet:
    """A ControlNet as training begins with it."""
    torch.manual_seed(1)
    return ControlNet.from_unet(unet, HINT_CHANNELS)


@pytest.fixture
def controlnet(unet) -> ControlNet:
    """A ControlNet all of whose weights matter."""
    return randomised(ControlNet.from_unet(unet, HINT_CHANNELS), seed=2)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """What a network is called with, for 64x64 pictures; no hint is like another."""
    generator = torch.Generator().manual_seed(3)
    return {
        "xt": torch.randn(2, 4, 8, 8, generator=generator),
        "t": torch.tensor([7, 801]),
        "context": torch.randn(2, 5, 16, generator=generator),
        "hint": torch.rand(2, 3, 64, 64, generator=generator),
    }

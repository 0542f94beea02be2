"""Small pieces of which every U-Net here is built."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with the most groups, up to 32, that divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zero_init(module: nn.Module) -> nn.Module:
    """The module with all parameters zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Multi-head self-attention over all positions, added to its input (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, channels: int, heads: int = 1):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # (n, 3c, h, w) -> three of (n, heads, positions, c / heads)
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, c // self.heads)).transpose(3, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.out(attended.transpose(2, 3).reshape(n, c, h, w))

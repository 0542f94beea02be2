"""Small pieces of which every U-Net here is built."""

import math

from torch import nn


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with the most groups, up to 32, that divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zero_init(module: nn.Module) -> nn.Module:
    """The module with all parameters zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module

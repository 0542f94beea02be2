"""Pictures larger than a network was trained on, patch by patch, without seams.

In every step the network sees overlapping patches of the size it knows, and its predictions are averaged with weights
that fade towards a patch's edges (Bar-Tal et al. 2023, "MultiDiffusion", equation 5). An average means the same for
eps, x0 and v. A patch knows nothing of what lies outside it but through its neighbours.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor


def starts(length: int, patch: int, stride: int) -> list[int]:
    """Where patches begin along a side, so that they cover it; the last one ends where the side does."""
    return [*range(0, length - patch, stride), max(0, length - patch)]


def fade(patch: int, device: torch.device | str = "cpu") -> Tensor:
    """Weights above 0 along one side of a patch that rise from its edges to its middle, float32 (patch,)."""
    positions = (torch.arange(patch, device=device) + 0.5) / patch
    return (torch.pi * positions).sin().square()


def in_patches(network: Callable[..., Tensor], patch: int, stride: int, cut: Sequence[str]) -> Callable[..., Tensor]:
    """The network, called as network(xt, t, **condition), on every patch of its input, with one prediction of all.

    Args:
        patch: side of a patch in positions of xt; a smaller picture is one patch.
        stride: from one patch to the next; at most `patch`, else there are gaps.
        cut: conditions that lie on the grid of xt, (..., H, W), and are cut as xt is.
    """

    def whole(xt: Tensor, t: Tensor, **condition) -> Tensor:
        height, width = (min(patch, side) for side in xt.shape[-2:])
        weight = fade(height, xt.device)[:, None] * fade(width, xt.device)
        tops, lefts = (starts(side, patch, stride) for side in xt.shape[-2:])
        windows = [(..., slice(top, top + height), slice(left, left + width)) for top, left in product(tops, lefts)]
        total = weight.new_zeros(xt.shape[-2:])
        for window in windows:
            total[window] += weight
        result = torch.zeros_like(xt)
        # One after another, so that a large picture needs no more memory at a time than one of the trained size.
        for window in windows:
            own = {name: tensor[window] if name in cut else tensor for name, tensor in condition.items()}
            result[window] += weight / total[window] * network(xt[window], t, **own)
        return result

    return whole

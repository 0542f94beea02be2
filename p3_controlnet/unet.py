"""A frozen U-Net and the ControlNets that steer it, as one network for the loss and the sampler.

xt, t, context, hint --ControlNets--> residuals --> U-Net(xt, t, context), residuals added to skips and middle

Pictures larger than the network was trained on are drawn patch by patch, without seams: in every step it sees
overlapping patches of the size it knows, and its predictions are averaged with weights that fade towards their edges
(Bar-Tal et al. 2023, "MultiDiffusion", equation 5). An average means the same for eps, x0 and v.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_gradients(network: nn.Module) -> None:
    """Let a network's layers keep only their inputs for the backward pass, and compute the rest again (Chen 2016)."""
    for module in network.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


class ControlledUNet:
    """A frozen U-Net steered by ControlNets (Zhang et al. 2023, figure 3), called as network(xt, t, **condition).

    `scales` has for each ControlNet what each of its residuals is multiplied by.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnets: Sequence[nn.Module],
        scales: Sequence[Sequence[float]] | None = None,
    ):
        self.unet, self.controlnets, self.scales = unet, controlnets, scales

    def encode_hint(self, hint: Tensor) -> Tensor:
        """What each ControlNet makes of the hints (N, 3, H, W): (N, ControlNets, C, h, w)."""
        return torch.stack([controlnet.encode_hint(hint) for controlnet in self.controlnets], dim=1)

    def residuals(
        self, xt: Tensor, t: Tensor, context: Tensor, hint: Tensor | None, features: Tensor | None
    ) -> list[Tensor]:
        """The residuals of all ControlNets, scaled and summed."""
        each = [None] * len(self.controlnets) if features is None else features.unbind(dim=1)
        several = [net(xt, t, context, hint, own) for net, own in zip(self.controlnets, each, strict=True)]
        if self.scales is not None:
            several = [
                [residual * scale for residual, scale in zip(residuals, scales, strict=True)]
                for residuals, scales in zip(several, self.scales, strict=True)
            ]
        return [reduce(torch.add, parts) for parts in zip(*several, strict=True)]

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        context: Tensor,
        hint: Tensor | None = None,
        features: Tensor | None = None,
        controlled: Tensor | None = None,
    ) -> Tensor:
        """One prediction, in the dtype of `xt`; only the ControlNets and the U-Net's decoder keep a graph.

        Args:
            xt, t, context, hint, features: see `ControlNet.forward`.
            controlled: bool (N,), the rows that get any control; all by default.
        """
        if controlled is None:
            residuals = self.residuals(xt, t, context, hint, features)
        else:
            rows = controlled.nonzero()[:, 0]
            given = [None if tensor is None else tensor[rows] for tensor in (xt, t, context, hint, features)]
            residuals = [
                part.new_zeros(len(xt), *part.shape[1:]).index_copy(0, rows, part) for part in self.residuals(*given)
            ]
        kind, dtype = xt.device.type, self.unet.conv_in.weight.dtype
        # Added in the dtype of the skips: accelerate gives what a wrapped ControlNet returns as fp32.
        skip_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        *skips, middle = (residual.to(skip_dtype) for residual in residuals)
        prediction = self.unet(
            xt.to(dtype),
            t,
            context.to(dtype),
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
        )
        return prediction.sample.to(xt.dtype)


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

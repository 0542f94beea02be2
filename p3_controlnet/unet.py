"""A frozen U-Net and the ControlNets that steer it, as one network for the loss and the sampler.

xt, t, context, hint --ControlNets--> residuals --> U-Net(xt, t, context), residuals added to skips and middle
"""

from collections.abc import Sequence
from functools import partial, reduce

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

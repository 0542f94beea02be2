"""A frozen diffusers U-Net run in two halves, between which ControlNets add their residuals.

    xt, t, context --encode--> skips, middle --add_residuals--> skips, middle --decode--> prediction

The first half is also how a ControlNet runs, whose trainable copy has the same parts under the same names.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Encoded(NamedTuple):
    """What the encoder hands to the decoder.

    Attributes:
        skips: outputs of `conv_in` and of every layer of the down blocks, in the order in which they ran.
        middle: output of the middle block.
        embedding: of the timestep, (N, D).
    """

    skips: list[Tensor]
    middle: Tensor
    embedding: Tensor


def attending(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    """The argument that only blocks with cross-attention take."""
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def encode(network: nn.Module, xt: Tensor, t: Tensor, context: Tensor, features: Tensor | None = None) -> Encoded:
    """Run `conv_in`, the time embedding, the down blocks and the middle block.

    Args:
        network: a `UNet2DConditionModel` or a `ControlNet`; it computes in the dtype of its weights.
        xt: noised latents (N, C, H, W).
        t: timesteps (N,).
        context: embedded prompts (N, tokens, D).
        features: added after `conv_in`: where a ControlNet takes its hint (Zhang et al. 2023, figure 3).
    """
    xt, context = (tensor.to(network.conv_in.weight.dtype) for tensor in (xt, context))
    embedding = network.time_embedding(network.time_proj(t).to(xt.dtype))
    h = network.conv_in(xt)
    if features is not None:
        h = h + features
    skips = [h]
    for block in network.down_blocks:
        h, outputs = block(h, embedding, **attending(block, context))
        skips += outputs
    return Encoded(skips, network.mid_block(h, embedding, **attending(network.mid_block, context)), embedding)


def add_residuals(encoded: Encoded, residuals: Sequence[Tensor]) -> Encoded:
    """The same with a residual added to every skip, and the last one to the middle."""
    *skips, middle = [
        h + residual.to(h.dtype) for h, residual in zip([*encoded.skips, encoded.middle], residuals, strict=True)
    ]
    return encoded._replace(skips=skips, middle=middle)


def decode(unet: UNet2DConditionModel, encoded: Encoded, context: Tensor) -> Tensor:
    """Run the up blocks and the last convolution: the prediction, (N, C, H, W)."""
    skips, h, embedding = list(encoded.skips), encoded.middle, encoded.embedding
    context = context.to(h.dtype)
    for block in unet.up_blocks:
        taken = [skips.pop() for _ in block.resnets][::-1]
        # Named, since a level with an odd side is more than half of the one below it.
        size = skips[-1].shape[2:] if skips else None
        h = block(h, tuple(taken), embedding, upsample_size=size, **attending(block, context))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def checkpoint_gradients(network: nn.Module) -> None:
    """Let the layers of a U-Net or ControlNet keep only their inputs for the backward pass (Chen et al. 2016).

    What else it needs is computed again then. Where no gradient flows nothing changes: the frozen encoder keeps nothing
    anyway, and frozen weights get no gradients.
    """
    for module in network.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def combine(several: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The residuals of several ControlNets, summed."""
    return [sum(parts[1:], parts[0]) for parts in zip(*several, strict=True)]


def guess_scales(count: int) -> list[float]:
    """Guess mode's strengths of `count` residuals, from 0.1 for the finest to 1 for the middle, evenly in logarithm.

    In guess mode the unconditional half gets no control at all, so that guidance enlarges what the hint alone says.
    """
    return torch.logspace(-1, 0, count, dtype=torch.float64).tolist()


class ControlledUNet:
    """A frozen U-Net and the ControlNets that steer it, as one network for `diffusion_loss` and `guided`.

    Args:
        unet: the frozen U-Net, in eval mode.
        controlnets: one or several, perhaps wrapped for training.
        scales: a strength for each ControlNet: one number, or one a residual; all 1 by default.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnets: Sequence[nn.Module],
        scales: Sequence[float | Sequence[float]] | None = None,
    ):
        self.unet, self.controlnets = unet, list(controlnets)
        self.scales = [1.0] * len(self.controlnets) if scales is None else list(scales)

    def encode_hint(self, hint: Tensor) -> Tensor:
        """What each ControlNet makes of the hints (N, 3, H, W): (N, ControlNets, C, h, w)."""
        return torch.stack([controlnet.encode_hint(hint) for controlnet in self.controlnets], dim=1)

    def residuals(
        self, xt: Tensor, t: Tensor, context: Tensor, hint: Tensor | None, features: Tensor | None
    ) -> list[Tensor]:
        """The summed residuals of all ControlNets."""
        each = [None] * len(self.controlnets) if features is None else features.unbind(dim=1)
        return combine(
            [
                controlnet(xt, t, context, hint=hint, features=own, scale=scale)
                for controlnet, own, scale in zip(self.controlnets, each, self.scales, strict=True)
            ]
        )

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
            xt: noised latents (N, C, H, W).
            t: timesteps (N,).
            context: embedded prompts (N, tokens, D).
            hint: (N, 3, H, W) in [0, 1], for every ControlNet; or instead
            features: what `encode_hint` made of the hints.
            controlled: bool (N,), the rows that get any control; all by default.
        """
        with torch.no_grad():
            encoded = encode(self.unet, xt, t, context)
        if controlled is None:
            residuals = self.residuals(xt, t, context, hint, features)
        else:
            rows = controlled.nonzero()[:, 0]
            given = [None if tensor is None else tensor[rows] for tensor in (hint, features)]
            some = self.residuals(xt[rows], t[rows], context[rows], *given)
            residuals = [part.new_zeros(len(xt), *part.shape[1:]).index_copy(0, rows, part) for part in some]
        return decode(self.unet, add_residuals(encoded, residuals), context).to(xt.dtype)

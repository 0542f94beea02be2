"""A diffusers U-Net run in two halves, between which residuals are added.

    xt, t, context --encode--> skips, middle --add_residuals--> skips, middle --decode--> prediction

The first half is also how a ControlNet runs, whose trainable copy has the same parts under the same names.
"""

from collections.abc import Sequence
from typing import NamedTuple

from diffusers import UNet2DConditionModel
from torch import Tensor, nn


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

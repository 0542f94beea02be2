"""Pictures of prompts by a latent diffusion alone, without a ControlNet."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.images import to_uint8
from common.sampling import ImageNoise, draw, guided
from latent_diffusion.base import Base


def called_with_context(unet: nn.Module) -> Callable[..., Tensor]:
    """A U-Net as the loss and the sampler call it: network(xt, t, context=...)."""
    return lambda xt, t, context: unet(xt, t, encoder_hidden_states=context).sample


@torch.no_grad()
def draw_prompts(
    base: Base,
    prompts: Sequence[str],
    keys: Sequence[tuple[int, ...]],
    steps: int = 20,
    guidance_scale: float = 2.0,
    batch_size: int = 8,
    method: str = "ddim",
) -> Tensor:
    """One picture for each prompt: uint8 (N, 3, H, W) on the CPU.

    Args:
        base: draws.
        prompts: texts; the guidance is away from the empty one.
        keys: of the pictures' noise, see `ImageNoise`; a picture depends on its key and its prompt alone.
        steps: of the reverse process.
        guidance_scale: 1 = off.
        batch_size: pictures at a time.
        method: of the reverse process.

    Raises:
        ValueError: more steps than the schedule has, or an unknown method.
        FloatingPointError: half precision overflows, or the weights are broken.
    """
    side, channels = base.unet.config.sample_size, base.unet.config.in_channels
    unet, timesteps = called_with_context(base.unet), base.schedule.timesteps(steps)

    def network(xt: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(xt.to(base.unet.dtype), t, context)

    contexts = base.encode_prompts(prompts)
    null = base.encode_prompts([""])
    images = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        context = contexts[part]
        denoise = guided(network, {"context": context}, {"context": null.expand_as(context)}, guidance_scale)
        xt = ImageNoise(keys[part]).draw((channels, side, side), base.device)
        # Latents have no bounds.
        latents = draw(denoise, base.schedule, xt, timesteps, base.prediction, method, clip_x0=False)
        if not latents.isfinite().all():  # pictures of them would be black
            raise FloatingPointError("latents are not finite")
        images.append(to_uint8(base.decode(latents)))
    return torch.cat(images)

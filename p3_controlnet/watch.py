"""What moves while a ControlNet's loss stays flat: how much the hint matters, and where discs are drawn."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from common.data import Batch
from common.images import grid, to_uint8
from common.sampling import Denoiser, ImageNoise, draw
from latent_diffusion.base import Base
from latent_diffusion.miniature.regions import circle_regions, deepest, hint_regions, intersection_over_union, region_at
from p3_controlnet.unet import ControlledUNet

STEPS = 10


class Watch:
    """Measures and draws a ControlNet on a batch of held-out pairs, always from the same noise.

    `null_context` (77, D) is the empty prompt's; `at_once` pairs go through the networks together, to bound the memory.
    """

    def __init__(self, base: Base, batch: Batch, null_context: Tensor, guidance_scale: float, at_once: int):
        self.base, self.guidance_scale = base, guidance_scale
        self.batch = {name: tensor.to(base.device) for name, tensor in batch.items()}
        self.hint, self.null_context = self.batch["hint"] / 255, null_context.to(base.device)
        self.targets = to_uint8(base.decode(self.batch["x0"]))
        self.parts = torch.arange(len(self.hint)).split(at_once)

    def sensitivity(self, controlnet: nn.Module) -> float:
        """||eps(hint) - eps(other hint)|| / ||eps(hint)|| (root mean squares); the other hint is the next pair's."""
        network, schedule, batch = ControlledUNet(self.base.unet, [controlnet]), self.base.schedule, self.batch
        xt = schedule.add_noise(batch["x0"], batch["eps"], batch["t"])

        def eps(hint: Tensor) -> Tensor:
            rows = [network(xt[k], batch["t"][k], batch["context"][k], hint[k]) for k in self.parts]
            return schedule.x0_and_eps(torch.cat(rows), xt, batch["t"], self.base.prediction)[1]

        own, other = eps(self.hint), eps(self.hint.roll(1, dims=0))
        return float((own - other).square().mean().sqrt() / own.square().mean().sqrt())

    def images(self, controlnet: nn.Module) -> Tensor:
        """The pairs drawn with few steps: uint8 (N, 3, H, W)."""
        network, schedule = ControlledUNet(self.base.unet, [controlnet]), self.base.schedule
        pictures = []
        for part in self.parts:
            told = {"context": self.batch["context"][part], "features": network.encode_hint(self.hint[part])}
            null = told | {"context": self.null_context.expand_as(told["context"])}
            denoise = Denoiser(network, schedule, self.base.prediction, told, null, self.guidance_scale, clip_x0=False)
            xt = ImageNoise([(0, k) for k in part.tolist()]).draw(self.batch["x0"].shape[1:], self.base.device)
            latents = draw(denoise, schedule, xt, schedule.timesteps(STEPS))
            pictures.append(to_uint8(self.base.decode(latents)))
        return torch.cat(pictures)

    def measure(self, controlnet: nn.Module) -> Mapping[str, float]:
        """The sensitivity, and the IoU of the discs that are drawn with those of the hints."""
        hints, images = (t.permute(0, 2, 3, 1).cpu().numpy() for t in (self.batch["hint"], self.images(controlnet)))
        overlaps = [
            intersection_over_union(disc, region_at(image, deepest(disc)))
            for hint, image in zip(hints, images)
            for disc in circle_regions(hint_regions(hint))[0]
        ]
        hint_iou = float(np.mean(overlaps)) if overlaps else 0.0
        return {"condition_sensitivity": self.sensitivity(controlnet), "hint_iou": hint_iou}

    def picture(self, controlnet: nn.Module) -> Tensor:
        """Rows of hints, of what is drawn and of targets: uint8 (3, height, width)."""
        rows = self.batch["hint"].cpu(), self.images(controlnet), self.targets
        return grid(torch.cat(rows), columns=len(rows[0]))

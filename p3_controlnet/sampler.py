"""From hints and prompts to pictures: ControlNets steer the reverse process of a frozen latent diffusion."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
from torch import Tensor

from common.cli import UserError, check, option
from common.images import to_uint8
from common.sampling import Denoiser, ImageNoise, Step, check_finite, draw_in_batches, reverse_process
from latent_diffusion.base import Base
from latent_diffusion.drawing import PRECISION_OF, PromptOptions, to_fp32
from latent_diffusion.pairs import Pair
from p3_controlnet.model import ControlNet
from p3_controlnet.unet import ControlledUNet, in_patches

Item = tuple[Pair, Tensor]  # with the pair's hint: uint8 (3, size, size)


@dataclass(frozen=True)
class HintOptions(PromptOptions):
    """How to draw pictures that follow hints."""

    size: int | None = option(None, "side of the pictures in pixels (default: the base's)", type=int)
    control_scale: Sequence[float] = option(
        (1.0,), "strength of the control; one number, or one for each ControlNet", type=float, nargs="+"
    )
    control_scales: Sequence[float] | None = option(
        None, "a further strength for each skip, finest first, and for the middle", type=float, nargs="+"
    )
    guess_mode: bool = option(
        False, "rely on the hint, so prompts may stay empty; strengths are diffusers', within 0.6 % of the original's",
        action="store_true",
    )  # fmt: skip
    patch_size: int | None = option(
        None, "pictures larger than this are drawn in patches of this side (default: the base's)", type=int
    )
    patch_stride: int | None = option(None, "pixels from one patch to the next (default: half a patch)", type=int)

    def __post_init__(self):
        super().__post_init__()
        for name in ("control_scale", "control_scales"):
            for number in getattr(self, name) or ():
                check(name, number, math.isfinite(number), "a number such as 0.8")

    def strengths(self, counts: Sequence[int]) -> list[list[float]]:
        """What the residuals of each ControlNet are multiplied by; ControlNet k has `counts[k]` residuals.

        A `UserError` if there are more or fewer numbers than ControlNets or residuals.
        """
        each = list(self.control_scale) * (len(counts) if len(self.control_scale) == 1 else 1)
        if (n := len(each)) != len(counts):
            raise UserError(f"--control-scale: {n} numbers for {len(counts)} ControlNets; give one, or one each")
        result = []
        for strength, count in zip(each, counts):
            finer = [1.0] * count if self.control_scales is None else self.control_scales
            if len(finer) != count:
                raise UserError(f"--control-scales: {len(finer)} numbers; this ControlNet has {count} residuals")
            # Guess mode: from 0.1 for the finest residual to 1 for the middle, evenly in logarithm.
            guesses = torch.logspace(-1, 0, count, dtype=torch.float64).tolist() if self.guess_mode else [1.0] * count
            result.append([strength * own * guess for own, guess in zip(finer, guesses)])
        return result


class HintSampler:
    """Draws pictures that follow hints.

    A picture depends on its hint, its prompt and its file name, which with the seed keys its noise; not on what else is
    drawn. The ControlNets must fit the base and are moved to its device and dtype.
    """

    def __init__(self, base: Base, controlnets: Sequence[ControlNet]):
        self.base, self.controlnets = base, list(controlnets)
        # Tensor cores want channels_last; a processor's group norm in bf16 is several times slower with it.
        halved = base.device.type == "cuda" and base.unet.dtype != torch.float32
        layout = torch.channels_last if halved else torch.contiguous_format
        base.unet.to(memory_format=layout)
        for controlnet in controlnets:
            controlnet.to(base.device, base.unet.dtype, memory_format=layout)

    def sides(self, options: HintOptions) -> tuple[int, int, int]:
        """The side of a picture, the side of a patch, and the stride from patch to patch, in pixels.

        A `UserError` if one does not fit the base.
        """
        factor = self.base.factor
        trained = self.base.unet.config.sample_size * factor
        size, patch = (trained if side is None else side for side in (options.size, options.patch_size))
        stride = max(factor, patch // 2 // factor * factor) if options.patch_stride is None else options.patch_stride
        for name, side in (("size", size), ("patch_size", patch), ("patch_stride", stride)):
            check(name, side, side >= factor and side % factor == 0, f"divisible by {factor}")
        check("patch_stride", stride, stride <= patch, f"at most --patch-size, {patch}")
        return size, patch, stride

    def network(self, options: HintOptions) -> Callable[..., Tensor]:
        """The controlled U-Net, in patches where pictures are larger than one; errors as `sides`, `strengths`."""
        size, patch, stride = (side // self.base.factor for side in self.sides(options))
        scales = options.strengths([len(controlnet.config.skip_channels) + 1 for controlnet in self.controlnets])
        network = ControlledUNet(self.base.unet, self.controlnets, scales)
        return in_patches(network, patch, stride, cut=("features",)) if size > patch else network

    def noise(self, items: Sequence[Item], options: HintOptions) -> Tensor:
        """The latents that the reverse process starts from: float32 (N, C, h, w)."""
        names = [PurePath(pair.target).as_posix() for pair, _ in items]
        noise = ImageNoise([(options.seed, zlib.crc32(name.encode())) for name in names])
        side = items[0][1].shape[-1] // self.base.factor
        return noise.draw((self.base.unet.config.in_channels, side, side), self.base.device)

    def walk(self, items: Sequence[Item], options: HintOptions) -> Iterator[Step]:
        """The reverse process of the items' latents, step by step; errors as `network`."""
        base, (pairs, hints) = self.base, zip(*items)
        contexts = base.encode_prompts(["", *(pair.prompt for pair in pairs)], ["", *(pair.where for pair in pairs)])
        with torch.no_grad():
            features = ControlledUNet(base.unet, self.controlnets).encode_hint(torch.stack(hints).to(base.device) / 255)
        told = {"context": contexts[1:], "features": features}
        null = told | {"context": contexts[:1].expand_as(contexts[1:])}
        if options.guess_mode:  # no control without the prompt, so that guidance enlarges what the hint alone says
            rows = torch.ones(len(pairs), dtype=torch.bool, device=base.device)
            told["controlled"], null["controlled"] = rows, ~rows
        denoise = Denoiser(
            self.network(options), base.schedule, base.prediction, told, null, options.scale, clip_x0=False
        )
        xt, last = self.noise(items, options), options.final_alpha
        timesteps = base.schedule.timesteps(options.steps, options.timestep_spacing)
        yield from reverse_process(denoise, base.schedule, xt, timesteps, options.sampler, final_alpha=last)

    def images(self, items: Sequence[Item], options: HintOptions) -> Iterator[tuple[Item, Tensor]]:
        """Draw the items in batches; yields each with its picture, uint8 (3, size, size) on the CPU, in their order.

        Errors as `walk` and `draw_in_batches`.
        """

        def finish(batch: Sequence[Item], latents: Tensor) -> Tensor:
            check_finite(latents, [pair.where for pair, _ in batch], PRECISION_OF[self.base.unet.dtype])
            return to_uint8(self.base.decode(latents))

        return draw_in_batches(
            items,
            lambda batch: self.walk(batch, options),
            finish,
            batch_size=options.batch_size,
            steps=options.steps,
            to_fp32=lambda: to_fp32(self.base.unet, self.base.vae, self.base.text_encoder, *self.controlnets),
        )

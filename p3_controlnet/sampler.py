"""From hints and prompts to pictures: a ControlNet steers the reverse process of a frozen latent diffusion."""

import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from common.cli import Progress, UserError
from common.images import to_uint8
from common.sampling import ImageNoise, guided, reverse_process
from latent_diffusion.base import Base, quiet
from latent_diffusion.drawing import GUIDANCE_SCALE
from latent_diffusion.pairs import Pair
from p3_controlnet.model import ControlNet
from p3_controlnet.patches import in_patches
from p3_controlnet.unet import ControlledUNet, guess_scales


@dataclass(frozen=True)
class SamplingOptions:
    """How to walk from noise to picture; every field is a flag.

    Args:
        size: side of the pictures, pixels; None for the base's own, which it was trained on.
        steps: steps of the reverse process.
        seed: the same seed gives the same pictures.
        guidance_scale: 1 = off.
        sampler: one of flags.py's `SAMPLERS`.
        control_scale: strength of the control, one number or one a ControlNet.
        control_scales: further strengths, one a residual: the skips', finest first, then the middle's.
        guess_mode: control the conditional half alone, and less the finer a residual is.
        patch_size: side of the patches in which larger pictures are drawn, pixels; None for the base's own size.
        patch_stride: from one patch to the next, pixels; None for half a patch.

    Raises:
        UserError: a value out of its range.
    """

    size: int | None = None
    steps: int = 20
    seed: int = 0
    guidance_scale: float = GUIDANCE_SCALE
    sampler: str = "ddim"
    control_scale: Sequence[float] = (1.0,)
    control_scales: Sequence[float] | None = None
    guess_mode: bool = False
    patch_size: int | None = None
    patch_stride: int | None = None

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: seeds are whole numbers from 0")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"--guidance-scale {self.guidance_scale}: must be at least 0")
        for flag, numbers in (("scale", self.control_scale), ("scales", self.control_scales or ())):
            if odd := [number for number in numbers if not math.isfinite(number)]:
                raise UserError(f"--control-{flag} {odd[0]}: must be a number such as 0.8")

    def strengths(self, counts: Sequence[int]) -> list[list[float]]:
        """What each ControlNet's residuals are multiplied by.

        Args:
            counts: how many residuals each ControlNet has.

        Raises:
            UserError: there are more or fewer numbers than ControlNets or residuals.
        """
        each = list(self.control_scale) * (len(counts) if len(self.control_scale) == 1 else 1)
        if len(each) != len(counts):
            raise UserError(
                f"--control-scale: {len(each)} numbers for {len(counts)} ControlNets; give one, or one each"
            )
        result = []
        for strength, count in zip(each, counts):
            finer = [1.0] * count if self.control_scales is None else self.control_scales
            if len(finer) != count:
                raise UserError(f"--control-scales: {len(finer)} numbers; this ControlNet has {count} residuals")
            guesses = guess_scales(count) if self.guess_mode else [1.0] * count
            result.append([strength * own * guess for own, guess in zip(finer, guesses)])
        return result


class HintSampler:
    """Draws pictures that follow hints.

    Args:
        base: the frozen model, on its device and in its precision.
        controlnets: one or several that fit it; moved to the same place.
        options: how to draw.

    Raises:
        UserError: an option does not fit the base or the ControlNets.
    """

    def __init__(self, base: Base, controlnets: Sequence[ControlNet], options: SamplingOptions):
        self.base, self.options = base, options
        trained = base.unet.config.sample_size * base.factor
        self.size, patch = (trained if side is None else side for side in (options.size, options.patch_size))
        stride = options.patch_stride
        if stride is None:
            stride = max(base.factor, patch // 2 // base.factor * base.factor)
        for flag, pixels in (("size", self.size), ("patch-size", patch), ("patch-stride", stride)):
            if pixels < base.factor or pixels % base.factor:
                raise UserError(f"--{flag} {pixels}: must be divisible by {base.factor}")
        if stride > patch:
            raise UserError(f"--patch-stride {stride}: must be at most --patch-size, {patch}")
        try:
            self.timesteps = base.schedule.timesteps(options.steps, "trailing")
        except ValueError as error:
            raise UserError(f"--steps {options.steps}: {error}") from None
        # Tensor cores want channels_last; a processor's group norm in bf16 is several times slower with it.
        halved = base.device.type == "cuda" and base.unet.dtype != torch.float32
        layout = torch.channels_last if halved else torch.contiguous_format
        base.unet.to(memory_format=layout)
        for controlnet in controlnets:
            controlnet.to(base.device, base.unet.dtype, memory_format=layout)
        scales = options.strengths([controlnet.residual_count for controlnet in controlnets])
        self.unet = ControlledUNet(base.unet, controlnets, scales)
        self.network = self.unet
        if self.size > patch:
            self.network = in_patches(self.unet, patch // base.factor, stride // base.factor, cut=("features",))

    def conditions(self, pairs: Sequence[Pair], hints: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the network is told of each picture, with its prompt and without; it stays the same in every step."""
        null, *contexts = self.base.encode_prompts(
            ["", *(pair.prompt for pair in pairs)], ["", *(pair.where for pair in pairs)]
        )
        features = self.unet.encode_hint(hints.to(self.base.device) / 255)
        condition = {"context": torch.stack(contexts), "features": features}
        without = {"context": null.expand(len(pairs), -1, -1), "features": features}
        if self.options.guess_mode:
            rows = torch.ones(len(pairs), dtype=torch.bool, device=self.base.device)
            condition["controlled"], without["controlled"] = rows, ~rows
        return condition, without

    def steps(self, pairs: Sequence[Pair], hints: Tensor) -> dict[str, Any]:
        """The arguments of `reverse_process` for these pictures.

        Noise is keyed by the seed and the picture's file name: it does not depend on what else is drawn.

        Args:
            pairs: what to draw.
            hints: theirs, uint8 (N, 3, size, size).
        """
        names = [PurePath(pair.target).as_posix() for pair in pairs]
        noise = ImageNoise([(self.options.seed, zlib.crc32(name.encode())) for name in names])
        side = self.size // self.base.factor
        return {
            "denoise": guided(self.network, *self.conditions(pairs, hints), self.options.guidance_scale),
            "schedule": self.base.schedule,
            "xt": noise.draw((self.base.unet.config.in_channels, side, side), self.base.device),
            "timesteps": self.timesteps,
            "prediction": self.base.prediction,
            "method": self.options.sampler,
            "clip_x0": False,  # latents have no bounds
        }

    @torch.no_grad()
    def images(self, pairs: Sequence[Pair], hints: Tensor, batch_size: int) -> Iterator[tuple[Pair, Tensor]]:
        """Draw the pairs in batches; yields each with its picture, uint8 (3, size, size) on the CPU, in their order.

        A batch that does not fit the GPU's memory is halved.

        Args:
            pairs: what to draw.
            hints: theirs, uint8 (N, 3, size, size).
            batch_size: pictures at a time, at most.

        Raises:
            UserError: a single picture does not fit the GPU's memory, or is not finite in fp32 either.
        """
        start = 0
        with Progress(len(pairs) * len(self.timesteps), "pictures", "step") as phase:
            while start < len(pairs):
                batch = slice(start, start + batch_size)
                if (pictures := self.drawn(pairs[batch], hints[batch], phase)) is not None:
                    yield from zip(pairs[batch], pictures)
                    start += batch_size
                    continue
                if batch_size == 1:
                    raise UserError(
                        f"a picture of {self.size}x{self.size} does not fit the GPU's memory; add --precision fp16, or"
                        " choose a smaller --size"
                    )
                batch_size = min(batch_size, len(pairs) - start) // 2 or 1
                print(f"warning: the GPU's memory is full; going on with --batch-size {batch_size}", file=sys.stderr)
                torch.cuda.empty_cache()

    def drawn(self, pairs: Sequence[Pair], hints: Tensor, phase: Progress) -> Tensor | None:
        """Pictures of one batch, uint8 (N, 3, size, size); None if it does not fit the GPU's memory.

        Where half precision overflows, which would give black pictures, the networks are turned to fp32 and stay so.

        Raises:
            UserError: a picture is not finite in fp32 either.
        """
        began = phase.n
        try:
            for step in reverse_process(**self.steps(pairs, hints)):
                phase.update(len(pairs))
                if not step.xt.isfinite().all():
                    break
            else:
                return to_uint8(self.base.decode(step.xt))
        except torch.OutOfMemoryError:
            phase.update(began - phase.n)
            return None
        phase.update(began - phase.n)
        dtype = self.base.unet.dtype
        if dtype == torch.float32:
            raise UserError(f"{pairs[0].where}: drawn in fp32 it is not finite; the weights are broken, name others")
        print(f"warning: the networks overflow in {dtype}; drawing in fp32 from here on", file=sys.stderr)
        with quiet():
            for model in (self.base.unet, self.base.vae, self.base.text_encoder, *self.unet.controlnets):
                model.float()
        return self.drawn(pairs, hints, phase)

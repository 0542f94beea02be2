"""From noises to faces: the reverse process of a face network, with the ground truth's conventions as defaults."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import Progress, UserError
from common.images import check_finite, to_uint8
from common.runtime import autocast
from common.sampling import ImageNoise, reverse_process
from common.schedule import NoiseSchedule
from p2_ddim.model import FaceUNetConfig, layout
from p2_ddim.noise import Noise

# A processor gains nothing from more at once, and larger tensors cost it page faults.
CPU_MEMORY = 2**28


@dataclass(frozen=True)
class DDIMOptions:
    """How to walk from noise to image; every field is a flag, and the defaults are the ground truth's conventions.

    Args:
        steps: steps of the reverse process.
        eta: 0 for DDIM, 1 for DDPM's posterior variance.
        timestep_spacing: which timesteps are visited; "leading" ones are shifted by one, to 981, 961, ..., 1.
        clip_x0: clamp the predicted x0 to [-1, 1] in every step.
        final_alpha: alphas_cumprod after the last step: "first" for alphas_cumprod[0], or "one".
        save_range: see `to_uint8`.
        seed: of the fresh noise where eta is above 0.

    Raises:
        UserError: a value out of its range.
    """

    steps: int = 50
    eta: float = 0.0
    timestep_spacing: str = "leading"
    clip_x0: bool = True
    final_alpha: str = "first"
    save_range: str = "minmax"
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"--eta {self.eta}: choose from 0 to 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: seeds are whole numbers from 0")

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The timesteps that are visited, from noisy to clean."""
        try:
            return schedule.timesteps(
                self.steps, self.timestep_spacing, offset=1 if self.timestep_spacing == "leading" else 0
            )
        except ValueError as error:
            raise UserError(f"--steps {self.steps} --timestep-spacing {self.timestep_spacing}: {error}") from None


def images_that_fit(config: FaceUNetConfig, height: int, width: int, number_bytes: int, memory: int) -> int:
    """How many images of a size the network takes at once, by what its largest layer and its kept outputs need.

    Args:
        config: the network's.
        height, width: of the images, pixels.
        number_bytes: bytes of one activation.
        memory: bytes there are for activations.
    """
    down, middle, up = layout(config)
    positions, kept, largest = height * width // config.patch_size**2, 0, 0
    for layer in (*down, *middle, *up):
        positions = {"shrink": positions // 4, "grow": positions * 4}.get(layer.kind, positions)
        # A residual block holds its input, the concatenation before it, two normalised copies, and its output.
        largest = max(largest, (4 * layer.in_channels + layer.out_channels) * positions)
        kept += layer.out_channels * positions if layer in down else 0
    return max(1, memory // (number_bytes * (kept + largest)))


class FaceSampler:
    """Draws faces from noises.

    Args:
        model: the network, called as model(xt, t); its weights are converted in place.
        about: what the weights file says of it: the schedule, the prediction and the image size.
        device: where to compute.
        precision: "fp32", "bf16" or "fp16" for the network; the images themselves stay fp32.
        compile: torch.compile the network, on a GPU with CUDA graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        about: Mapping[str, Any],
        device: torch.device,
        precision: str = "fp32",
        compile: bool = False,
    ):
        self.model, self.about, self.schedule = model, about, NoiseSchedule(**about["schedule"])
        self.device, self.precision = device, precision
        # channels_last is what processors and tensor cores want; a GPU's fp32 kernels want the usual layout.
        usual = device.type == "cuda" and precision == "fp32"
        self.layout = torch.contiguous_format if usual else torch.channels_last
        self.model.to(device, memory_format=self.layout)
        if precision != "fp32":
            # Autocast would convert the weights in every step. Sinusoids and norms stay fp32.
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(torch.bfloat16 if precision == "bf16" else torch.float16)
        self.cuda_graphs = compile and device.type == "cuda"
        mode = "reduce-overhead" if self.cuda_graphs else "default"
        self.network = torch.compile(self.model, dynamic=False, mode=mode) if compile else self.model

    @torch.no_grad()
    def denoise(self, xt: Tensor, t: int) -> Tensor:
        """The network's output at one timestep."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the output of the step before may be overwritten
        timesteps = torch.full((len(xt),), t, device=xt.device)
        with autocast(self.device, self.precision):
            return self.network(xt.contiguous(memory_format=self.layout), timesteps)

    def steps(self, noises: Sequence[Noise], options: DDIMOptions) -> dict[str, Any]:
        """The arguments of `reverse_process` for noises of one size.

        Fresh noise is keyed by the seed and the noise's name: it does not depend on what else is drawn.
        """
        return {
            "denoise": self.denoise,
            "schedule": self.schedule,
            "xt": torch.stack([noise.xt for noise in noises]).to(self.device),
            "timesteps": options.timesteps(self.schedule),
            "prediction": self.about["prediction"],
            "method": "ddim",
            "eta": options.eta,
            "noise": ImageNoise([(options.seed, zlib.crc32(noise.name.encode())) for noise in noises]),
            "clip_x0": options.clip_x0,
            "final_alpha": options.final_alpha,
        }

    def batch_size(self, height: int, width: int) -> int:
        """How many images of a size fit the device's memory at once."""
        free = CPU_MEMORY
        if self.device.type == "cuda":  # what torch keeps for later is free too
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = (torch.cuda.mem_get_info(self.device)[0] + kept) * 7 // 10
        return images_that_fit(self.model.config, height, width, 4 if self.precision == "fp32" else 2, free)

    def faces(
        self, noises: Sequence[Noise], options: DDIMOptions, batch_size: int | None = None
    ) -> Iterator[tuple[Noise, Tensor]]:
        """Draw the noises in batches; yields each with its image, uint8 (C, H, W) on the CPU, in their order.

        Args:
            noises: what to start from; sizes may differ.
            options: how to walk.
            batch_size: images at a time; None for as many as fit the memory, fewer where that was too many.

        Raises:
            UserError: a batch does not fit the GPU's memory, or an image is not finite.
        """
        with Progress(len(noises) * options.steps, "faces", "step") as phase:
            for (_, height, width), group in groupby(noises, lambda noise: tuple(noise.xt.shape)):
                alike, size, start = list(group), batch_size or self.batch_size(height, width), 0
                while start < len(alike):
                    batch = alike[start : start + size]
                    if (images := self.drawn(batch, options, phase)) is not None:
                        yield from zip(batch, images)
                        start += len(batch)
                        continue
                    if batch_size or len(batch) == 1:
                        mend = "choose a smaller --batch-size" if len(batch) > 1 else "choose --precision bf16"
                        raise UserError(f"{len(batch)} images of {width}x{height} do not fit the GPU's memory; {mend}")
                    size = len(batch) // 2
                    torch.cuda.empty_cache()

    def drawn(self, batch: Sequence[Noise], options: DDIMOptions, phase: Progress) -> Tensor | None:
        """Images of noises of one size, uint8 (N, C, H, W) on the CPU; None if they do not fit the GPU's memory.

        Raises:
            UserError: an image is not finite.
        """
        began = phase.n
        try:
            for step in reverse_process(**self.steps(batch, options)):
                images = step.xt
                phase.update(len(batch))
        except torch.OutOfMemoryError:
            phase.update(began - phase.n)
            return None
        check_finite(images, [noise.name for noise in batch], self.precision)
        return to_uint8(images, options.save_range)

    def pictures(self, noises: Sequence[Noise], options: DDIMOptions, batch_size: int | None = None) -> Tensor:
        """The images of `faces` alone, all of one size, as one uint8 tensor (N, C, H, W).

        Raises:
            UserError: as `faces`, or the noises differ in size.
        """
        if other := next((noise for noise in noises if noise.xt.shape != noises[0].xt.shape), None):
            sizes = " and ".join(f"{noise.xt.shape[2]}x{noise.xt.shape[1]}" for noise in (noises[0], other))
            raise UserError(f"noises {noises[0].name} and {other.name}: are {sizes}; a figure takes one size")
        return torch.stack([image for _, image in self.faces(noises, options, batch_size)])

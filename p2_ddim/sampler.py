"""From noises to faces: the options of the reverse process, and the sampler that walks it."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import UserError, check, option
from common.images import SAVE_RANGES, to_uint8
from common.runtime import autocast
from common.sampling import Denoiser, ImageNoise, Step, check_finite, draw_in_batches, reverse_process
from common.schedule import SPACINGS, NoiseSchedule
from p2_ddim.noise import Noise

# An automatic batch has at most so many values in the output of the network's first layer: 64 faces of 256x256 with the
# course's network on a GPU, where a batch that does not fit is halved, and one face on a CPU, which gains from no more.
CPU_VALUES, GPU_VALUES = 2**22, 2**29


@dataclass(frozen=True)
class DDIMOptions:
    """How to draw, by default as the ground truth; every field is a flag, and a bad value is a `UserError`."""

    steps: int = option(50, "steps of the reverse process")
    eta: float = option(0.0, "share of fresh noise in every step: 0 is DDIM, 1 has DDPM's posterior variance")
    timestep_spacing: str = option("leading", "how the visited timesteps are spaced", choices=SPACINGS)
    clip_x0: bool = option(True, "clamp the predicted x0 to [-1, 1] in every step")
    final_alpha: str = option("first", "alphas_cumprod at the end: its first value, or 1", choices=("first", "one"))
    save_range: str = option(
        "minmax", "what becomes black and white: an image's own minimum and maximum, or -1 and 1", choices=SAVE_RANGES
    )
    seed: int = option(0, "seed of the fresh noise")
    batch_size: int | str = option("auto", "images drawn at a time; auto picks a number by their size", type=str)

    def __post_init__(self):
        check("eta", self.eta, 0 <= self.eta <= 1, "between 0 and 1")
        check("seed", self.seed, self.seed >= 0, "at least 0")
        counted = str(self.batch_size).isdecimal() and int(self.batch_size) > 0
        check("batch_size", self.batch_size, counted or self.batch_size == "auto", "auto, or a number above 0")


class FaceSampler:
    """Draws faces from noises.

    Args:
        model: the network, called as model(xt, t); its weights are converted in place.
        about: facts of the weights file: the schedule, the prediction and the image size.
        precision: "fp32", "bf16" or "fp16" for the network; xt stays fp32.
        compile: torch.compile the network, on a GPU with CUDA graphs.
    """

    def __init__(
        self, model: nn.Module, about: Mapping[str, Any], device: torch.device, precision="fp32", compile=False
    ):
        self.model, self.about, self.schedule = model, about, NoiseSchedule(**about["schedule"])
        self.device, self.precision = device, precision
        # (C, H, W) of the images that it was trained on.
        self.shape = model.config.image_channels, about["image_size"], about["image_size"]
        # CPUs and tensor cores want channels_last; the fp32 kernels of a GPU want the usual layout.
        usual = device.type == "cuda" and precision == "fp32"
        self.layout = torch.contiguous_format if usual else torch.channels_last
        self.model.to(device, memory_format=self.layout)
        if precision != "fp32":
            # Autocast would convert the weights anew in every step. Sinusoids and norms stay fp32.
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(torch.bfloat16 if precision == "bf16" else torch.float16)
        self.cuda_graphs = compile and device.type == "cuda"
        mode = "reduce-overhead" if self.cuda_graphs else "default"
        self.network = torch.compile(self.model, dynamic=False, mode=mode) if compile else self.model

    def predict(self, xt: Tensor, t: Tensor) -> Tensor:
        """The network's output for xt (N, C, H, W) at timesteps t (N,)."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the output of the step before may be overwritten
        with autocast(self.device, self.precision):
            return self.network(xt.contiguous(memory_format=self.layout), t)

    def noise(self, noises: Sequence[Noise], options: DDIMOptions) -> Tensor:
        """xT of noises of one size: (N, C, H, W) on the device."""
        return torch.stack([noise.xt for noise in noises]).to(self.device)

    def walk(self, noises: Sequence[Noise], options: DDIMOptions) -> Iterator[Step]:
        """The steps of the reverse process from noises of one size.

        Fresh noise is keyed by the seed and the noise's name, so it does not depend on what else is drawn.
        """
        yield from reverse_process(
            Denoiser(self.predict, self.schedule, self.about["prediction"], clip_x0=options.clip_x0),
            self.schedule,
            self.noise(noises, options),
            self.schedule.timesteps(options.steps, options.timestep_spacing),
            eta=options.eta,
            noise=ImageNoise([(options.seed, zlib.crc32(noise.name.encode())) for noise in noises]),
            final_alpha=options.final_alpha,
        )

    def images(self, noises: Sequence[Noise], options: DDIMOptions) -> Iterator[tuple[Noise, Tensor]]:
        """Draw noises, whose sizes may differ; yields each with its image, uint8 (C, H, W) on the CPU, in their order.

        Errors as `draw_in_batches`.
        """

        def finish(batch: Sequence[Noise], xt: Tensor) -> Tensor:
            check_finite(xt, [noise.name for noise in batch], self.precision)
            return to_uint8(xt, options.save_range)

        walk = partial(self.walk, options=options)
        for (_, height, width), alike in groupby(noises, lambda noise: noise.xt.shape):
            fitting = self.pick_batch_size(height, width)
            batch_size = fitting if options.batch_size == "auto" else int(options.batch_size)
            yield from draw_in_batches(list(alike), walk, finish, batch_size=batch_size, steps=options.steps)

    def pick_batch_size(self, height: int, width: int) -> int:
        """How many images of a size to draw at a time."""
        config, values = self.model.config, CPU_VALUES if self.device.type == "cpu" else GPU_VALUES
        return max(1, values // (height * width // config.patch_size**2 * config.widths[0]))

    def pictures(self, noises: Sequence[Noise], options: DDIMOptions) -> Tensor:
        """The images of noises as one tensor, uint8 (N, C, H, W); a `UserError` if they differ in size."""
        if len({noise.xt.shape for noise in noises}) > 1:
            raise UserError(f"{noises[0].name} and others differ in size; a figure takes noises of one size")
        return torch.stack([image for _, image in self.images(noises, options)])

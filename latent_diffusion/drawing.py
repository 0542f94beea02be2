"""Pictures of prompts by a latent diffusion alone, and the flags of everything that draws with one."""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import Parser, add_options, check, option
from common.images import to_uint8
from common.runtime import PRECISIONS, pick_device, pick_precision
from common.sampling import Denoiser, ImageNoise, Step, check_finite, draw_in_batches, reverse_process
from common.schedule import SPACINGS
from latent_diffusion.base import Base, load_base, to_fp32
from latent_diffusion.files import cache_folder

SAMPLERS = ("ddim", "dpm-solver++")
GUIDANCE_SCALE = 7.5  # what Stable Diffusion is usually drawn with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_OF = {dtype: name for name, dtype in DTYPES.items()}

Item = tuple[str, tuple[int, ...]]
"""A prompt, and the numbers that key its picture's noise beside the seed."""


@dataclass(frozen=True)
class PromptOptions:
    """How to draw with a latent diffusion; every field is a flag, and a bad value is a `UserError`."""

    steps: int = option(20, "steps of the reverse process")
    seed: int = option(0, "the same seed gives the same pictures")
    guidance_scale: float | None = option(
        None,
        f"strength of guidance; 1 turns it off (default: what suits the weights, else {GUIDANCE_SCALE})",
        type=float,
    )
    sampler: str = option("ddim", "method of the reverse process", choices=SAMPLERS)
    timestep_spacing: str = option(
        "trailing", "how the visited timesteps are spaced; the original code's are leading", choices=SPACINGS[:2]
    )
    final_alpha: str = option("one", "alphas_cumprod at the end: its first value, or 1", choices=("first", "one"))
    batch_size: int = option(8, "pictures at a time; fewer need less memory")
    precision: str = option(
        "auto", "number format of the networks; auto: bf16 on a CPU that has it, else fp32", choices=PRECISIONS
    )
    device: str = option("auto", "where to compute: auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self):
        check("steps", self.steps, self.steps >= 1, "at least 1")
        check("seed", self.seed, self.seed >= 0, "at least 0")
        check("guidance_scale", self.guidance_scale, 0 <= self.scale < math.inf, "at least 0")
        check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")

    @property
    def scale(self) -> float:
        """The guidance scale, or `GUIDANCE_SCALE` where none was given."""
        return GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale


def add_drawing_flags(parser: Parser, options: type[PromptOptions] = PromptOptions, **defaults: Any):
    """Add a group with a flag for every option and `--cache-dir`; returns the group, for further flags.

    `options` is `PromptOptions` or extends it; `defaults` are those that differ from the dataclass's.
    """
    group = parser.add_argument_group("drawing")
    add_options(group, options, **defaults)
    group.add_argument(
        "--cache-dir", type=Path, default=cache_folder(), help="folder for safetensors copies of .ckpt files"
    )
    return group


def load_chosen_base(args: Namespace) -> Base:
    """The base at `args.base`, on the device and in the precision that the flags name; errors as `load_base`."""
    device = pick_device(args.device)
    return load_base(args.base, device, DTYPES[pick_precision(args.precision, device)], args.cache_dir)


class PromptSampler:
    """Draws pictures of prompts with a base, which is turned to fp32 where half precision overflows.

    Items are pairs (prompt, key): a picture depends on its prompt and on the noise keyed by (seed, *key) alone, not on
    what else is drawn.
    """

    def __init__(self, base: Base):
        self.base = base

    def noise(self, items: Sequence[Item], options: PromptOptions) -> Tensor:
        """Latents to start from: float32 (N, C, h, w), of the size that the base was trained on."""
        unet = self.base.unet.config
        noise = ImageNoise([(options.seed, *key) for _, key in items])
        return noise.draw((unet.in_channels, unet.sample_size, unet.sample_size), self.base.device)

    def walk(self, items: Sequence[Item], options: PromptOptions) -> Iterator[Step]:
        """The reverse process of the items' latents, step by step; guidance is away from the empty prompt."""
        base = self.base
        contexts = base.encode_prompts([prompt for prompt, _ in items])
        denoise = Denoiser(
            lambda xt, t, context: base.unet(xt.to(base.unet.dtype), t, encoder_hidden_states=context).sample,
            base.schedule,
            base.prediction,
            {"context": contexts},
            {"context": base.encode_prompts([""]).expand_as(contexts)},
            options.scale,
            clip_x0=False,  # latents have no bounds
        )
        xt = self.noise(items, options)
        timesteps = base.schedule.timesteps(options.steps, options.timestep_spacing)
        yield from reverse_process(
            denoise, base.schedule, xt, timesteps, options.sampler, final_alpha=options.final_alpha
        )

    def images(self, items: Sequence[Item], options: PromptOptions) -> Iterator[tuple[Item, Tensor]]:
        """Draw the items in batches; yields each with its picture, uint8 (3, H, W) on the CPU, in their order.

        A `UserError` at once for more steps than the schedule has; later as `draw_in_batches`.
        """
        self.base.schedule.timesteps(options.steps, options.timestep_spacing)

        def finish(batch: Sequence[Item], latents: Tensor) -> Tensor:
            check_finite(latents, [repr(prompt) for prompt, _ in batch], PRECISION_OF[self.base.unet.dtype])
            return to_uint8(self.base.decode(latents))

        return draw_in_batches(
            items,
            lambda batch: self.walk(batch, options),
            finish,
            batch_size=options.batch_size,
            steps=options.steps,
            to_fp32=lambda: to_fp32(self.base.unet, self.base.vae, self.base.text_encoder),
        )


def draw_prompts(base: Base, items: Sequence[Item], options: PromptOptions) -> Tensor:
    """The pictures of items alone, as one tensor: uint8 (N, 3, H, W) on the CPU; see `PromptSampler.images`."""
    return torch.stack([image for _, image in PromptSampler(base).images(items, options)])

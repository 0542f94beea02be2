"""The flags of everything that draws with a latent diffusion, and the base that they name."""

from pathlib import Path

import torch

from common.cli import Parser
from common.runtime import PRECISIONS, pick_device, pick_precision
from latent_diffusion.base import Base, load_base
from latent_diffusion.single_file import cache_folder

SAMPLERS = ("ddim", "dpm-solver++")
GUIDANCE_SCALE = 7.5  # what Stable Diffusion is usually drawn with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_drawing_flags(parser: Parser, sampler: str, guidance: str):
    """Add them as a group; returns it, for further flags. A guidance scale that is not given is None.

    Args:
        parser: gets the group.
        sampler: one of `SAMPLERS`, the default.
        guidance: what decides about the guidance scale first, for the help.
    """
    group = parser.add_argument_group("drawing")
    group.add_argument("--steps", type=int, default=20, help="steps of the reverse process")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures")
    group.add_argument("--guidance-scale", type=float, help=f"1 = off (default: {guidance}, else {GUIDANCE_SCALE})")
    group.add_argument("--sampler", choices=SAMPLERS, default=sampler, help="reverse process")
    group.add_argument("--batch-size", type=int, default=8, help="pictures at a time; bounds the memory")
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the networks")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--cache-dir", type=Path, default=cache_folder(), help="where a .ckpt is kept as safetensors")
    return group


def base_from(args) -> Base:
    """The frozen base that the arguments name, on its device and in its precision.

    Raises:
        UserError: it is missing or broken, or no such device.
    """
    device = pick_device(args.device)
    return load_base(args.base, device, DTYPES[pick_precision(args.precision, device)], args.cache_dir)

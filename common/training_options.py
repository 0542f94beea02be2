"""The flags that every training script has, and the learning rate that they describe."""

import argparse
import math
from dataclasses import dataclass

import torch

from common.cli import add_options, check, option, options_from
from common.runtime import PRECISIONS

EVERY = ("save_every", "validate_every", "sample_every", "log_every")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; every field is a flag of the same name."""

    steps: int = option(20_000, "optimizer steps in all")
    batch_size: int = option(128, "images an optimizer step, over all processes")
    accumulate: int = option(1, "forward passes an optimizer step; more need less memory")
    lr: float = option(5e-4, "peak learning rate of AdamW")
    weight_decay: float = option(0.01, "of AdamW")
    warmup: int = option(200, "steps over which the learning rate rises")
    decay: str = option("linear", "shape of the learning rate's way to near zero", choices=("linear", "cosine"))
    decay_fraction: float = option(0.5, "part of the run, at its end, over which the learning rate decays")
    clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.999, "decay of the averaged weights, once warmed up")
    seed: int = option(0, "of the initial weights, the data order and the noise")
    precision: str = option("auto", "of the network; auto: bf16 on a CPU that has it, else fp32", choices=PRECISIONS)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps; for several GPUs use accelerate launch")
    offload: bool = option(False, "keep averaged weights and AdamW's moments off the GPU: less of its memory, slower")
    compile: bool = option(False, "torch.compile the network: a minute to start, then faster")
    save_every: int = option(500, "steps between training states")
    validate_every: int = option(500, "steps between validation losses")
    sample_every: int = option(2000, "steps between sample grids")
    log_every: int = option(20, "steps between log lines")

    def seed_weights(self) -> None:
        """Seed PyTorch's own generator, which draws initial weights; it takes 64 bits of a seed."""
        torch.manual_seed(self.seed % 2**64)


def add_training_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add a flag for every field of `TrainingOptions`; `defaults` are this problem's own."""
    add_options(parser.add_argument_group("training"), TrainingOptions, **defaults)


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """The options among parsed arguments; a `UserError` if a value is out of its range."""
    options = options_from(args, TrainingOptions)
    for name in ("steps", "batch_size", "accumulate", "lr", "clip", *EVERY):
        check(name, getattr(options, name), getattr(options, name) > 0, "above 0")
    for name in ("seed", "warmup", "weight_decay"):
        check(name, getattr(options, name), getattr(options, name) >= 0, "at least 0")
    check("decay_fraction", options.decay_fraction, 0 <= options.decay_fraction <= 1, "between 0 and 1")
    check("ema", options.ema, 0 <= options.ema < 1, "at least 0 and below 1")
    return options


def learning_rate(options: TrainingOptions, step: int) -> float:
    """The rate of step 0..steps-1: linear warm-up, a plateau, then decay to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    decay_steps = max(1, round(options.steps * options.decay_fraction))
    left = min(1.0, (options.steps - step) / decay_steps)
    if options.decay == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return options.lr * warm * max(0.01, left)

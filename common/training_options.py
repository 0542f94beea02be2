"""The flags that every training script has, and the learning rate that they describe."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from common.errors import UserError
from common.runtime import PRECISIONS

FOR_LARGE = ("offload",)


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field of `TrainingOptions` that knows how to be a flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; every field is a flag of the same name."""

    steps: int = option(20_000, "optimizer steps in all")
    batch_size: int = option(128, "images an optimizer step, over all processes")
    accumulate: int = option(1, "forward passes an optimizer step; more need less memory")
    lr: float = option(5e-4, "peak learning rate of AdamW")
    weight_decay: float = option(0.01, "of AdamW")
    warmup: int = option(200, "steps over which the learning rate rises")
    decay: str = option("linear", "shape of the learning rate's way to near zero", ("linear", "cosine"))
    decay_fraction: float = option(0.5, "part of the run, at its end, over which the learning rate decays")
    clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.999, "decay of the averaged weights, once warmed up")
    seed: int = option(0, "of the initial weights, the data order and the noise")
    precision: str = option("auto", "of the network; auto: bf16 on a CPU that has it, else fp32", PRECISIONS)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps; for several GPUs use accelerate launch")
    offload: bool = option(False, "keep averaged weights and AdamW's moments off the GPU: less of its memory, slower")
    compile: bool = option(False, "torch.compile the network: a minute to start, then faster")
    save_every: int = option(500, "steps between training states")
    validate_every: int = option(500, "steps between validation losses")
    sample_every: int = option(2000, "steps between sample grids")
    log_every: int = option(20, "steps between log lines")


def add_training_arguments(parser: argparse.ArgumentParser, large: bool = False, **defaults) -> None:
    """Add a flag for every field of `TrainingOptions`; `defaults` are this problem's own.

    Flags that only a model needs that hardly fits a GPU are there where it is `large`.
    """
    group = parser.add_argument_group("training")
    for item in fields(TrainingOptions):
        if item.name in FOR_LARGE and not large:
            continue
        facts = {"default": defaults.get(item.name, item.default), "help": item.metadata["help"]}
        if item.type is bool:
            facts["action"] = argparse.BooleanOptionalAction
        else:
            facts |= {"type": item.type, "choices": item.metadata["choices"]}
        group.add_argument("--" + item.name.replace("_", "-"), **facts)


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """The options among parsed arguments.

    Raises:
        UserError: a value is out of its range.
    """
    given = {item.name: getattr(args, item.name) for item in fields(TrainingOptions) if hasattr(args, item.name)}
    options = TrainingOptions(**given)

    def check(name: str, fine: bool, range_: str) -> None:
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be {range_}")

    for name in ("steps", "batch_size", "accumulate", "lr", "clip"):
        check(name, getattr(options, name) > 0, "above 0")
    for name in ("save_every", "validate_every", "sample_every", "log_every"):
        check(name, getattr(options, name) > 0, "above 0")
    for name in ("seed", "warmup", "weight_decay"):
        check(name, getattr(options, name) >= 0, "at least 0")
    check("decay_fraction", 0 <= options.decay_fraction <= 1, "between 0 and 1")
    check("ema", 0 <= options.ema < 1, "at least 0 and below 1")
    return options


def learning_rate(options: TrainingOptions, step: int) -> float:
    """The rate of step 0..steps-1: linear warm-up, a plateau, then decay to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    decay_steps = max(1, round(options.steps * options.decay_fraction))
    left = min(1.0, (options.steps - step) / decay_steps)
    if options.decay == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return options.lr * warm * max(0.01, left)

"""The loop every model here is trained with: accelerate for devices and precision, EMA, exact resume, logs.

Nothing random is carried from step to step: batch, noise and dropout of a step are drawn from generators keyed by
(seed, step). A run that was killed and resumed therefore takes the very same steps as one that was not, and a step
sees the same batch however many processes share it.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.checkpoint import EMA_PREFIX, load_tensors, save_tensors
from common.errors import UserError
from common.runtime import pick_device, pick_precision, seeded_generator

Batch = dict[str, Tensor]
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; field names are the command-line flags (see `add_training_arguments` for their meaning)."""

    steps: int = 20_000
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 5e-4
    weight_decay: float = 0.01
    warmup: int = 200
    decay: str = "linear"
    decay_fraction: float = 0.5
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    compile: bool = False
    save_every: int = 500
    validate_every: int = 500
    sample_every: int = 2000
    log_every: int = 20


HELP = {
    "steps": "optimizer steps in all",
    "batch_size": "images an optimizer step, over all processes",
    "accumulate": "forward passes an optimizer step; more need less memory",
    "lr": "peak learning rate of AdamW",
    "weight_decay": "AdamW's weight decay",
    "warmup": "steps of linear warm-up",
    "decay": "shape of the learning rate's way to near zero: linear or cosine",
    "decay_fraction": "part of the run, at its end, over which the rate decays",
    "clip": "largest gradient norm",
    "ema": "decay of the averaged weights, once warmed up",
    "seed": "of the initial weights, the data order and the noise",
    "precision": "auto, fp32, bf16 or fp16",
    "device": "auto, cpu, cuda; several GPUs come from accelerate launch",
    "compile": "torch.compile the network (a minute to start, then faster)",
    "save_every": "steps between training states",
    "validate_every": "steps between validation losses",
    "sample_every": "steps between sample grids",
    "log_every": "steps between log lines",
}


def add_training_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add a flag for every field of `TrainingOptions`; `defaults` are this problem's own."""
    group = parser.add_argument_group("training")
    for field in fields(TrainingOptions):
        flag, default = "--" + field.name.replace("_", "-"), defaults.get(field.name, field.default)
        if field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=HELP[field.name])
        else:
            group.add_argument(flag, type=field.type, default=default, help=HELP[field.name])


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """The options among parsed arguments.

    Raises:
        UserError: a value is out of its range.
    """
    options = TrainingOptions(**{field.name: getattr(args, field.name) for field in fields(TrainingOptions)})
    for name in (
        "steps",
        "batch_size",
        "accumulate",
        "lr",
        "clip",
        "save_every",
        "validate_every",
        "sample_every",
        "log_every",
    ):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above 0")
    if options.decay not in ("linear", "cosine"):
        raise UserError(f"--decay {options.decay}: choose from linear, cosine")
    if not 0 <= options.ema < 1 or not 0 <= options.decay_fraction <= 1:
        raise UserError(f"--ema {options.ema} --decay-fraction {options.decay_fraction}: both lie between 0 and 1")
    return options


def learning_rate(options: TrainingOptions, step: int) -> float:
    """The rate of step 0..steps-1: linear warm-up, a plateau, then decay to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    decay_steps = max(1, round(options.steps * options.decay_fraction))
    left = min(1.0, (options.steps - step) / decay_steps)
    if options.decay == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return options.lr * warm * max(0.01, left)


def average_model(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights; buffers are copied.

    The decay warms up as (1 + n) / (10 + n), so that short runs do not remember their first weights.
    """

    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = updates.item()
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=False)
    return averaged.requires_grad_(False)


class Trainer:
    """One training run in one folder; running the same command again goes on where it stopped.

    Args:
        model: the network; its parameters that require gradients are trained.
        options: how to train.
        folder: where states, logs and sample grids go.
        about: facts every checkpoint carries (`kind`, `config`, `schedule`, ...), enough to rebuild the model.
        make_batch: (step, generator) -> tensors of the whole optimizer step on the CPU, first dimension batch_size.
        loss_fn: (model, batch) -> mean loss of the batch, a scalar.
        validate: (EMA model) -> validation loss; None for no validation.
        sample: (EMA model, step) -> image tensor (3, H, W) in [0, 1] to log; None for no grids.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainingOptions,
        folder: Path,
        about: Mapping[str, Any],
        make_batch: Callable[[int, torch.Generator], Batch],
        loss_fn: Callable[[nn.Module, Batch], Tensor],
        validate: Callable[[nn.Module], float] | None = None,
        sample: Callable[[nn.Module, int], Tensor] | None = None,
    ):
        self.options, self.folder, self.about = options, Path(folder), dict(about)
        self.make_batch, self.loss_fn, self.validate, self.sample = make_batch, loss_fn, validate, sample
        device = pick_device(options.device)
        precision = pick_precision(options.precision, device)
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(precision, precision),
            gradient_accumulation_steps=options.accumulate,
            cpu=device.type == "cpu",
        )
        share = options.accumulate * self.accelerator.num_processes
        if options.batch_size % share:
            raise UserError(
                f"--batch-size {options.batch_size}: must be divisible by {self.accelerator.num_processes} processes"
                f" x --accumulate {options.accumulate}"
            )
        self.part = options.batch_size // share
        # channels_last is what tensor cores and oneDNN want for convolutions.
        self.model = model.to(self.accelerator.device, memory_format=torch.channels_last)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.raw_optimizer = torch.optim.AdamW(trained, options.lr, weight_decay=options.weight_decay, fused=True)
        self.ema = average_model(self.model, options.ema)
        self.step, self.best = 0, math.inf
        if (newest := self.states()) and self.resumable(newest[-1]):
            self.load(newest[-1])
        runnable = torch.compile(self.model) if options.compile else self.model
        self.runnable, self.optimizer = self.accelerator.prepare(runnable, self.raw_optimizer)

    def states(self) -> list[Path]:
        """Training states in the folder, oldest first."""
        return sorted(self.folder.glob("state_*.safetensors"))

    def resumable(self, path: Path) -> bool:
        """Check that the state belongs to this command."""
        _, about = load_tensors(path, prefix="?")
        for name in ("kind", "config", "schedule"):
            if about.get(name) != json.loads(json.dumps(self.about.get(name))):
                raise UserError(f"{path}: its {name} is not this run's; choose another --out or remove the old states")
        return True

    def save(self) -> None:
        """Write the whole training state as one file; keep the last two."""
        state = {MODEL_PREFIX + name: tensor for name, tensor in self.model.state_dict().items()}
        state |= {EMA_PREFIX + name: tensor for name, tensor in self.ema.module.state_dict().items()}
        for name, parameter in self.trained():
            for key, value in self.raw_optimizer.state[parameter].items():
                state[f"{OPTIMIZER_PREFIX}{name}.{key}"] = value
        scaler = self.accelerator.scaler
        run = {"step": self.step, "best": self.best, "scaler": scaler.state_dict() if scaler else None}
        path = self.folder / f"state_{self.step:08d}.safetensors"
        save_tensors(path, state, self.about | run | {"training": asdict(self.options)})
        for old in self.states()[:-2]:
            old.unlink()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters in the optimizer."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def load(self, path: Path) -> None:
        """Take over a state that `save` wrote."""
        tensors, about = load_tensors(path)

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(under(MODEL_PREFIX))
        self.ema.module.load_state_dict(under(EMA_PREFIX))
        state = self.raw_optimizer.state_dict()
        for index, (name, parameter) in enumerate(self.trained()):
            # The fused optimizer walks raw memory, so moments must lie in memory as their parameter does.
            moments = under(f"{OPTIMIZER_PREFIX}{name}.").items()
            state["state"][index] = {
                key: torch.empty_like(parameter).copy_(t) if t.shape == parameter.shape else t for key, t in moments
            }
        self.raw_optimizer.load_state_dict(state)
        self.step, self.best = about["step"], about["best"]
        self.ema.n_averaged.fill_(self.step)
        if self.accelerator.scaler and about["scaler"]:
            self.accelerator.scaler.load_state_dict(about["scaler"])

    def log(self, writer: SummaryWriter, **numbers: float) -> None:
        """Append to metrics.jsonl and TensorBoard."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step} | numbers) + "\n")
        for name, number in numbers.items():
            writer.add_scalar(name, number, self.step)

    def forget_later_metrics(self) -> None:
        """Drop the log lines of steps that a kill undid."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self.step))

    def take_step(self) -> tuple[float, float]:
        """One optimizer step; returns its loss (mean over all processes) and gradient norm."""
        options, accelerator = self.options, self.accelerator
        batch = self.make_batch(self.step, seeded_generator(options.seed, 1, self.step))
        set_seed(options.seed + self.step * accelerator.num_processes + accelerator.process_index)  # dropout
        for group in self.raw_optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step)
        losses, norm = [], torch.zeros(())
        for micro in range(options.accumulate):
            start = (micro * accelerator.num_processes + accelerator.process_index) * self.part
            piece = {name: t[start : start + self.part].to(accelerator.device) for name, t in batch.items()}
            with accelerator.accumulate(self.runnable):
                with accelerator.autocast():
                    loss = self.loss_fn(self.runnable, piece)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.runnable.parameters(), options.clip)
                    mean = accelerator.reduce(torch.stack([*losses, loss.detach()]).mean(), reduction="mean").item()
                    self.stop_unless_finite(mean, float(norm))
                losses.append(loss.detach())
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        self.ema.update_parameters(self.model)
        return mean, float(norm)

    def stop_unless_finite(self, loss: float, norm: float) -> None:
        """Raise before the step does harm; under fp16 an overflowing gradient is the scaler's to handle."""
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.accelerator.scaler):
            raise UserError(
                f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate"
                f" {learning_rate(self.options, self.step):.3g}; lower --lr or use --precision fp32"
            )

    def run(self) -> nn.Module:
        """Train until `options.steps`; returns the averaged model in eval mode."""
        main, options = self.accelerator.is_main_process, self.options
        writer = None
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.forget_later_metrics()
            writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step)
        self.runnable.train()
        bar = tqdm(total=options.steps, initial=self.step, desc="train", unit="step", disable=None if main else True)
        while self.step < options.steps:
            loss, norm = self.take_step()
            bar.update()
            if not main:
                continue
            if self.step % options.log_every == 0:
                bar.set_postfix(loss=f"{loss:.4f}", norm=f"{norm:.2f}")
                rate = bar.format_dict["rate"] or 0.0
                lr = learning_rate(options, self.step - 1)
                self.log(writer, loss=loss, norm=norm, lr=lr, images_per_second=rate * options.batch_size)
            last = self.step == options.steps
            if self.validate and (last or self.step % options.validate_every == 0):
                self.keep_best(writer, self.validate(self.ema.module.eval()))
            if self.sample and (last or self.step % options.sample_every == 0):
                writer.add_image("samples", self.sample(self.ema.module.eval(), self.step), self.step)
            if last or self.step % options.save_every == 0:
                self.save()
        bar.close()
        if main:
            writer.close()
        self.accelerator.wait_for_everyone()
        return copy.deepcopy(self.ema.module).eval()

    def keep_best(self, writer: SummaryWriter, loss: float) -> None:
        """Log a validation loss; write the averaged weights as `best.safetensors` if it is the lowest."""
        self.log(writer, validation_loss=loss)
        if loss < self.best:
            self.best = loss
            about = self.about | {"step": self.step, "training": asdict(self.options), "validation_loss": loss}
            save_tensors(self.folder / "best.safetensors", self.ema.module.state_dict(), about)

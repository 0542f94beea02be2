"""A training run's folder: its state (weights, AdamW's moments, EMA weights) and its log."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from common.checkpoint import EMA_PREFIX, load_strictly, load_tensors, save_tensors
from common.cli import UserError, note, say
from common.images import save_png
from common.output import write_atomically
from common.training_options import TrainingOptions

MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


def average_model(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, in eval mode; buffers are copied.

    The decay warms up as (1 + n) / (10 + n), so that short runs do not remember their first weights.
    """

    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = updates.item()
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=False)
    return averaged.requires_grad_(False).eval()


class PagedAdamW(torch.optim.AdamW):
    """The same update as `torch.optim.AdamW`, with the moments kept in main memory.

    They are moved to the GPU one parameter at a time, which saves eight bytes of its memory per trained parameter and
    costs each step the transfer.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            every = group["params"]
            try:
                for parameter in every:
                    group["params"] = [parameter]
                    self.move(parameter, parameter.device)
                    super().step(closure)
                    self.move(parameter, torch.device("cpu"))
            finally:
                group["params"] = every

    def move(self, parameter: Tensor, device: torch.device) -> None:
        """Move one parameter's moments to a device."""
        state = self.state[parameter]
        state.update({name: moment.to(device) for name, moment in state.items() if name != "step"})


class TrainingState:
    """Everything that a training run must save to go on exactly where it stopped.

    The arguments are those of `Trainer`, with the model on its device.

    Attributes:
        optimizer: AdamW over the trained parameters.
        averaged: the EMA model, in eval mode; with --offload it lies in main memory.
        step: optimizer steps taken so far.
        best: the lowest validation loss so far.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainingOptions,
        folder: Path,
        about: Mapping[str, Any],
        notes: Mapping[str, Any],
    ):
        self.model, self.options, self.folder = model, options, folder
        # As they read back from a checkpoint, where tuples are lists.
        self.about, self.notes = json.loads(json.dumps([about, asdict(options) | dict(notes)]))
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = PagedAdamW if options.offload else torch.optim.AdamW
        self.optimizer = optimizer(self.trained.values(), options.lr, weight_decay=options.weight_decay, fused=True)
        self.ema = average_model(model, options.ema)
        self.averaged = self.ema.module.to("cpu") if options.offload else self.ema.module
        self.step, self.best = 0, math.inf

    def files(self) -> list[Path]:
        """Saved states, oldest first."""
        return sorted(self.folder.glob("state_*.safetensors"))

    def save(self, scaler: torch.amp.GradScaler | None) -> None:
        """Write the whole state as one file; keep the last two."""
        tensors = {MODEL_PREFIX + name: tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {EMA_PREFIX + name: tensor for name, tensor in self.averaged.state_dict().items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{OPTIMIZER_PREFIX}{name}.{key}"] = value
        run = {"step": self.step, "best": self.best, "scaler": scaler.state_dict() if scaler else None}
        path = self.folder / f"state_{self.step:08d}.safetensors"
        save_tensors(path, tensors, self.about | run | {"training": self.notes})
        for old in self.files()[:-2]:
            old.unlink()

    def resume(self, scaler: torch.amp.GradScaler | None) -> None:
        """Load the newest saved state that is whole, if there is any, and say which options changed since.

        A `UserError` if all are broken, or it is another model's, or from after this run's last step.
        """
        if not (files := self.files()):
            return
        for path in reversed(files):
            try:
                tensors, about = load_tensors(path)
                break
            except UserError as error:
                if path == files[0]:
                    raise
                note(str(path), f"{error}; going on from the state before")
        for name, fact in self.about.items():
            if about.get(name) != fact:
                raise UserError(f"{path}: its {name} is not this run's; choose another --out, or remove its states")
        self.step, self.best = about["step"], about["best"]
        if self.step > self.options.steps:
            raise UserError(f"{path}: is past --steps {self.options.steps}; raise it, or choose another --out")

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        load_strictly(self.model, under(MODEL_PREFIX), str(path))
        load_strictly(self.averaged, under(EMA_PREFIX), str(path))
        state = self.optimizer.state_dict()
        for index, (name, parameter) in enumerate(self.trained.items()):
            # The fused optimizer walks raw memory, so moments must lie in memory as their parameter does.
            moments = under(f"{OPTIMIZER_PREFIX}{name}.").items()
            state["state"][index] = {
                key: torch.empty_like(parameter).copy_(t) if t.shape == parameter.shape else t for key, t in moments
            }
        self.optimizer.load_state_dict(state)
        self.ema.n_averaged.fill_(self.step)
        if scaler and about["scaler"]:
            scaler.load_state_dict(about["scaler"])
        changes = [
            f"{name} {before} -> {now}"
            for name, now in self.notes.items()
            if (before := about["training"].get(name)) != now
        ]
        say(f"resuming {path}{' with ' * bool(changes)}{', '.join(changes)}")


class RunLog:
    """The log of one run, in its folder, which exists; a run that goes on appends to what it logged before.

    Lines of later steps than `step`, which a kill undid, are dropped, and so is one that was not finished.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
            write_atomically(self.path, lambda temporary: temporary.write_text(kept))
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def numbers(self, step: int, **numbers: float) -> None:
        """Append to metrics.jsonl and TensorBoard."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def picture(self, step: int, picture: Tensor) -> None:
        """Write samples, uint8 (3, H, W), as a PNG and to TensorBoard."""
        save_png(self.folder / f"samples_{step:08d}.png", picture)
        self.writer.add_image("samples", picture, step)

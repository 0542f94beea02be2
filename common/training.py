"""The loop every model here is trained with: accelerate for devices and precision, EMA, exact resume, logs.

Nothing random is carried from step to step: batch, noise and dropout of a step are drawn from generators keyed by
(seed, step). A run that was killed and resumed therefore takes exactly the steps of one that was not, and a step sees
the same batch however many processes share it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.checkpoint import save_tensors, to_half
from common.cli import Progress, UserError, say
from common.data import Batch, DrawnAhead
from common.output import check_output_folder
from common.runtime import pick_device, pick_precision, seeded_generator
from common.schedule import NoiseSchedule
from common.training_options import TrainingOptions, learning_rate
from common.training_state import RunLog, TrainingState


def diffusion_loss(
    network: Callable[..., Tensor],
    batch: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    prediction: str,
    gamma: float,
) -> Tensor:
    """Mean squared error of the prediction, each image weighted by min-SNR (Hang et al. 2023).

    Args:
        network: called as network(xt, t, **condition).
        batch: `x0` in [-1, 1] and `eps`, both (N, C, H, W), and timesteps `t` (N,); all else in it is the condition.
        prediction: what the network is to predict: eps, x0 or v.
        gamma: cap of the signal-to-noise ratio in the weights; 0 leaves the error unweighted.
    """
    condition = dict(batch)
    x0, eps, t = (condition.pop(name) for name in ("x0", "eps", "t"))
    output = network(schedule.add_noise(x0, eps, t), t, **condition).float()
    error = (output - schedule.target(x0, eps, t, prediction)).square().mean(dim=(1, 2, 3))
    if gamma:
        error = error * schedule.min_snr_weight(t, prediction, gamma)
    return error.mean()


def loss_of(batch: Batch, loss_fn: Callable[[nn.Module, Batch], Tensor]) -> Callable[[nn.Module], Tensor]:
    """A validation loss: from a model to its loss on always the same batch."""

    def loss(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return loss_fn(model, {name: tensor.to(device) for name, tensor in batch.items()})

    return loss


def save_half(path: Path) -> Callable[[nn.Module, dict[str, Any]], None]:
    """For `Trainer.finish`: writes the EMA weights to one safetensors file in fp16."""
    return lambda averaged, facts: save_tensors(path, to_half(averaged.state_dict()), facts)


class Trainer:
    """One training run in one folder; running the same command again goes on where it stopped.

    Several processes share a run when `torchrun` or `accelerate launch` starts them; all must see the same folder.

    Args:
        model: its parameters that require gradients are trained.
        folder: where states, logs and sample grids go.
        about: facts every checkpoint carries (`kind`, `config`, `schedule`, ...), enough to rebuild the model; a
            resumed run must have the same.
        make_batch: (step, generator) -> tensors of the whole optimizer step on the CPU, first dimension batch_size.
        loss_fn: (model, batch) -> mean loss of the batch, a scalar.
        validate: EMA model -> validation loss; None for no validation.
        sample: EMA model -> uint8 picture (3, H, W) of samples; None for no pictures.
        measure: EMA model -> further numbers to log with every validation loss; None for none.
        notes: how the run was made beyond its options; checkpoints carry both, and a resumed run may change them.

    A `UserError` if the options do not suit the machine, or the folder cannot be written or holds another run's states.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        options: TrainingOptions,
        folder: Path,
        about: Mapping[str, Any],
        make_batch: Callable[[int, torch.Generator], Batch],
        loss_fn: Callable[[nn.Module, Batch], Tensor],
        validate: Callable[[nn.Module], Tensor] | None = None,
        sample: Callable[[nn.Module], Tensor] | None = None,
        measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
        notes: Mapping[str, Any] | None = None,
    ):
        self.options, self.folder = options, Path(folder)
        self.make_batch, self.loss_fn = make_batch, loss_fn
        self.validate, self.sample, self.measure = validate, sample, measure
        check_output_folder(self.folder)
        device = pick_device(options.device)
        precision = pick_precision(options.precision, device)
        if precision == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16: training in fp16 needs a GPU; use bf16 or fp32")
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(precision, precision),
            gradient_accumulation_steps=options.accumulate,
            cpu=device.type == "cpu",
        )
        share = options.accumulate * self.accelerator.num_processes
        if options.batch_size % share:
            needed = f"{self.accelerator.num_processes} processes x --accumulate {options.accumulate}"
            raise UserError(f"--batch-size {options.batch_size}: must be divisible by {needed}")
        self.part = options.batch_size // share
        on_cuda = self.accelerator.device.type == "cuda"
        self.batch_of = DrawnAhead(self.draw_batch, options.steps) if on_cuda else self.draw_batch
        # channels_last is what tensor cores and oneDNN want for convolutions.
        self.model = model.to(self.accelerator.device, memory_format=torch.channels_last)
        self.state = TrainingState(self.model, options, self.folder, about, notes or {})
        self.state.resume(self.accelerator.scaler)
        runnable = torch.compile(self.model) if options.compile else self.model
        self.runnable, self.optimizer = self.accelerator.prepare(runnable, self.state.optimizer)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.state.step

    @property
    def averaged(self) -> nn.Module:
        """The EMA model, in eval mode; with --offload it lies in main memory."""
        return self.state.averaged

    def draw_batch(self, step: int) -> Batch:
        """The batch of a step, on the CPU: always the same."""
        # A key's second number keeps streams apart: 1 batches, 2 data order, 3 validation, 4 dropout.
        return self.make_batch(step, seeded_generator(self.options.seed, 1, step))

    def take_step(self) -> tuple[float, float]:
        """One optimizer step; returns its loss (mean over all processes) and gradient norm."""
        options, accelerator = self.options, self.accelerator
        batch = self.batch_of(self.step)
        dropout = seeded_generator(options.seed, 4, self.step, accelerator.process_index)
        torch.manual_seed(dropout.initial_seed())
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step)
        losses = []
        for micro in range(options.accumulate):
            start = (micro * accelerator.num_processes + accelerator.process_index) * self.part
            rows = slice(start, start + self.part)
            piece = {name: tensor[rows].to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(self.runnable):
                with accelerator.autocast():
                    loss = self.loss_fn(self.runnable, piece)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self.runnable.parameters(), options.clip))
                    mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
                    self.stop_unless_finite(mean, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.state.step += 1
        self.state.ema.update_parameters(self.model)
        return mean, norm

    def stop_unless_finite(self, loss: float, norm: float) -> None:
        """Raise before the step does harm; under fp16 an overflowing gradient is the scaler's to handle."""
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.accelerator.scaler):
            raise UserError(
                f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate"
                f" {learning_rate(self.options, self.step):.3g}; lower --lr or use --precision fp32"
            )

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last one, happens now."""
        return self.step % every == 0 or self.step == self.options.steps

    def run(self) -> nn.Module:
        """Train until `options.steps`; returns the averaged model in eval mode.

        A `UserError` if the loss or the gradient is not finite, or the disk is full; the states written so far stay.
        """
        main, options = self.accelerator.is_main_process, self.options
        if (processes := self.accelerator.num_processes) > 1:
            say(f"{processes} processes, {self.part} images each at a time")
        if main:
            self.log = RunLog(self.folder, self.step)
        self.runnable.train()
        steps, seconds = 0, 0.0
        with Progress(options.steps, "train", "step", done=self.step) as phase:
            while self.step < options.steps:
                started = perf_counter()
                loss, norm = self.take_step()
                steps, seconds = steps + 1, seconds + perf_counter() - started
                phase.update()
                if not main:
                    continue
                if self.step % options.log_every == 0:
                    rate = steps * options.batch_size / seconds
                    steps, seconds = 0, 0.0
                    phase.bar.set_postfix(loss=f"{loss:.4f}", norm=f"{norm:.2f}")
                    lr = learning_rate(options, self.step - 1)
                    self.log.numbers(self.step, loss=loss, norm=norm, lr=lr, images_per_second=round(rate, 2))
                if self.validate and self.due(options.validate_every):
                    self.report(loss, phase)
                if self.sample and self.due(options.sample_every):
                    with self.averaged_at_hand() as averaged:
                        self.log.picture(self.step, self.sample(averaged))
                if self.due(options.save_every):
                    self.state.save(self.accelerator.scaler)
        if main:
            self.log.writer.close()
        self.accelerator.wait_for_everyone()
        return self.averaged

    def finish(self, write: Callable[[nn.Module, dict[str, Any]], None]) -> None:
        """As `run`; then the main process writes the result: write(EMA model, facts about it)."""
        averaged = self.run()
        if self.accelerator.is_main_process:
            write(averaged, self.facts(self.validation_loss()))
        self.accelerator.end_training()

    @contextlib.contextmanager
    def averaged_at_hand(self) -> Iterator[nn.Module]:
        """The averaged model, for a while where it can be run."""
        self.averaged.to(self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            yield self.averaged
        if self.options.offload:
            self.averaged.to("cpu")

    def validation_loss(self) -> float:
        """The averaged model's loss on held-out data."""
        with self.averaged_at_hand() as averaged:
            return float(self.validate(averaged))

    def facts(self, validation_loss: float) -> dict[str, Any]:
        """What the averaged weights are saved with."""
        return self.state.about | {"step": self.step, "training": self.state.notes, "validation_loss": validation_loss}

    def report(self, training_loss: float, phase: Progress) -> None:
        """Log how good the averaged model is, keep the best one, and print the numbers where no bar shows them."""
        loss, measured = self.validation_loss(), {}
        if self.measure:
            with self.averaged_at_hand() as averaged:
                measured = dict(self.measure(averaged))
        self.log.numbers(self.step, validation_loss=loss, **measured)
        if loss < self.state.best:
            self.state.best = loss
            save_tensors(self.folder / "best.safetensors", self.averaged.state_dict(), self.facts(loss))
        if phase.bar.disable:
            shown = {"loss": training_loss, "validation loss": loss} | measured
            line = ", ".join(f"{name.replace('_', ' ')} {number:.4f}" for name, number in shown.items())
            say(f"step {self.step}: {line}")

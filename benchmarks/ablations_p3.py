"""Ablations of the ControlNet: its zero convolutions, and its hint encoder."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ablation_tables import Ablation, Rows, Settings, fingerprint, told
from benchmarks.ablation_training import LEARNING, RUNS, run_folder
from common.cli import UserError, say
from common.data import Batch
from common.layers import zeroed
from common.runtime import autocast, pick_device, pick_precision, seeded_generator
from common.training import Trainer, loss_of
from common.training_options import TrainingOptions
from latent_diffusion.base import Base, load_base
from latent_diffusion.pairs import HELD_OUT_EVERY, read_table
from p3_controlnet import fill50k
from p3_controlnet.cache import encode_pairs
from p3_controlnet.model import ControlNet
from p3_controlnet.sample import BASE
from p3_controlnet.train import PairBatches, control_loss, hint_reader
from p3_controlnet.watch import Watch

WATCHED, VALIDATED, DROP = 32, 128, 0.1  # held-out pairs drawn, and whose loss is taken; part of the prompts left out
GUIDANCE_SCALE = 2.0
PARTS = 3  # of a training; at the end of each it is watched


class PooledHint(nn.Module):
    """In place of the hint encoder: the hint averaged over the pixels of a latent, and one convolution.

    Args:
        hint_channels: colour channels of the hint.
        factor: pixels a latent, along a side.
        out_channels: width of the U-Net's first level.
    """

    def __init__(self, hint_channels: int, factor: int, out_channels: int):
        super().__init__()
        self.factor = factor
        self.conv = zeroed(nn.Conv2d(hint_channels, out_channels, 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        return self.conv(F.avg_pool2d(hint, self.factor))


class NoHint(nn.Module):
    """In place of the hint encoder: nothing, whatever the hint."""

    def __init__(self, factor: int, out_channels: int):
        super().__init__()
        self.factor, self.out_channels = factor, out_channels

    def forward(self, hint: Tensor) -> Tensor:
        n, _, height, width = hint.shape
        return hint.new_zeros(n, self.out_channels, height // self.factor, width // self.factor)


def without_zeros(controlnet: ControlNet) -> ControlNet:
    """The ControlNet with all its zero convolutions drawn like ordinary ones."""
    last = controlnet.controlnet_cond_embedding.conv_out
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, last):
        convolution.reset_parameters()
    return controlnet


def with_pooled_hint(controlnet: ControlNet) -> ControlNet:
    """The ControlNet with a `PooledHint`."""
    config, first = controlnet.config, controlnet.config.block_out_channels[0]
    hint = PooledHint(config.conditioning_channels, config.hint_factor, first)
    controlnet.controlnet_cond_embedding = hint.to(controlnet.conv_in.weight.device)
    return controlnet


def without_hint(controlnet: ControlNet) -> ControlNet:
    """The ControlNet with a `NoHint`."""
    config = controlnet.config
    controlnet.controlnet_cond_embedding = NoHint(config.hint_factor, config.block_out_channels[0])
    return controlnet


AS_BUILT = {"as built": lambda controlnet: controlnet}
ZERO = AS_BUILT | {"ordinary convolutions": without_zeros}
HINT = AS_BUILT | {"pooled hint, one convolution": with_pooled_hint, "no hint": without_hint}
SETTINGS = {
    "steps": (300, "of each training"),
    "batch_size": (64, "pairs a step"),
    "lr": (1e-3, "peak rate"),
    "seed": (0, "of weights, order and noise"),
    "pairs": (3000, "circles to draw and train on, less every eleventh"),
    "hint_channels": ([16, 32, 48, 64], "widths of the hint encoder"),
    "base": (BASE, "the frozen model"),
    **RUNS,
}
COLUMNS = {
    "loss before": ("loss_before", "{:.4f}"),
    "after": ("loss", "{:.4f}"),
    "sensitivity": ("condition_sensitivity", "{:.4f}"),
    **{
        f"hint IoU, {part}": (f"hint_iou_{k}", "{:.3f}")
        for k, part in enumerate(("a third of the steps", "two thirds", "all"), start=1)
    },
}
FACTS = (
    "Each trained for {steps} steps of {batch_size} pairs on {pairs} circles, rate {lr}, seed {seed}, hint encoder"
    f" {{hint_channels}}; loss of {VALIDATED} held-out pairs, IoU of {WATCHED} drawn with guidance {GUIDANCE_SCALE:g}"
)


class Workshop:
    """The base and the pairs that all variants are trained on.

    Args:
        settings: `SETTINGS`.

    Raises:
        UserError: a setting does not fit, or the base is missing or broken.
    """

    def __init__(self, settings: Settings):
        self.settings, self.out = settings, settings["out"]
        if min(settings["steps"] - PARTS + 1, settings["batch_size"], settings["pairs"] - HELD_OUT_EVERY + 1) < 1:
            raise UserError(
                f"--steps {settings['steps']} --batch-size {settings['batch_size']} --pairs {settings['pairs']}: at"
                f" least {PARTS}, 1 and {HELD_OUT_EVERY}"
            )
        self.device = pick_device()
        self.base: Base = load_base(settings["base"], self.device)
        factor = 2 ** (len(settings["hint_channels"]) - 1)
        if factor != self.base.factor:
            raise UserError(f"--hint-channels: fold {factor} pixels, the base {self.base.factor}")
        self.size = self.base.unet.config.sample_size * factor
        self.data = self.out / f"circles-{settings['pairs']}-{self.size}"
        if not self.data.exists():
            flags = ["--count", str(settings["pairs"]), "--size", str(self.size)]
            fill50k.main(fill50k.parse_arguments([str(self.data), *flags]))
        self.pairs = read_table(self.data)

    @cached_property
    def cache(self):
        """Their latents and contexts."""
        return encode_pairs(self.base, self.pairs, self.data, self.size, self.data / "cache")

    @cached_property
    def hints(self):
        """Their hints, read once for all variants."""
        return hint_reader(self.pairs, self.data, self.size)

    def batches(self, held_out: bool, count: int, drop: float, seed: int) -> PairBatches:
        """Batches of the pairs that are trained on, or of those held out."""
        members = torch.arange(len(self.pairs))
        members = members[(members % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out]
        return PairBatches(self.cache, self.hints, members, self.base.schedule, count, drop, seed)

    def train(self, variant: str, change) -> dict[str, Any]:
        """Train one variant; returns its row."""
        settings, base = self.settings, self.base
        facts = {name: told(value) for name, value in settings.items() if name != "out"}
        facts["base"] = fingerprint(settings["base"])
        folder = run_folder(self.out, variant, facts)
        steps, every = settings["steps"], settings["steps"] // PARTS
        options = TrainingOptions(
            steps=steps, batch_size=settings["batch_size"], lr=settings["lr"], seed=settings["seed"],
            validate_every=every, **LEARNING,
        )  # fmt: skip
        torch.manual_seed(options.seed)
        controlnet = change(ControlNet.from_unet(base.unet, settings["hint_channels"]))

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return control_loss(model, base, batch, gamma=0.0)

        watched, held_out = (self.batches(True, n, 0.0, 0)(0, seeded_generator(0, 3)) for n in (WATCHED, VALIDATED))
        watch = Watch(base, watched, self.cache.null_context, GUIDANCE_SCALE, options.batch_size)
        validate = loss_of(held_out, loss_fn)
        with torch.no_grad(), autocast(self.device, pick_precision("auto", self.device)):
            before = float(validate(controlnet))
        about = {"kind": variant, "config": asdict(controlnet.config)}
        batches = self.batches(False, options.batch_size, DROP, options.seed)
        say(f"{variant}: in {folder}")
        trainer = Trainer(
            controlnet, options, folder, about, batches, loss_fn, validate, notes=facts, measure=watch.measure
        )
        trainer.run()
        trainer.accelerator.end_training()
        return {"variant": variant, "loss_before": before} | watched_figures(folder, [every, 2 * every, steps])


def watched_figures(folder: Path, steps: list[int]) -> dict[str, float]:
    """The hint IoU that a run's log has of these steps, and what else it has of the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if "hint_iou" in line}
    figures = {f"hint_iou_{k}": by_step[step]["hint_iou"] for k, step in enumerate(steps, start=1)}
    last = by_step[steps[-1]]
    return figures | {"loss": last["validation_loss"], "condition_sensitivity": last["condition_sensitivity"]}


def measured(variants):
    """A measurement that trains each of some variants."""

    def measure(settings: Settings) -> Rows:
        workshop = Workshop(settings)
        return [workshop.train(variant, change) for variant, change in variants.items()]

    return measure


def ablations() -> Iterable[tuple[str, Ablation]]:
    """The ablations of this problem by their names."""
    for name, about, variants in (
        ("p3-zero", "zero convolutions against ordinary ones", ZERO),
        ("p3-hint", "the hint encoder against a pooled hint and none", HINT),
    ):
        yield name, Ablation("p3.md", about, SETTINGS, measured(variants), COLUMNS, FACTS, "", ("base",))


P3 = dict(ablations())

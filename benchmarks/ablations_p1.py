"""Ablations of problem 1: guidance, its interval, samplers and steps, and how a class is told to the network."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ablation_tables import RUNS, SHORT, Ablation, Rows, Settings, run_folder
from common.checkpoint import load_about, save_tensors
from common.cli import check, say
from common.training_options import TrainingOptions
from p1_ddpm.digits import DATA, DOMAINS, read_real
from p1_ddpm.evaluate import draw_sets, measure
from p1_ddpm.judge import WEIGHTS as JUDGES
from p1_ddpm.judge import load_judge
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from p1_ddpm.sample import WEIGHTS, DigitOptions, DigitSampler
from p1_ddpm.train import DigitTraining, train

SAMPLERS = ("dpm-solver++", "ddim", "ddpm")
INTERVALS = ((0, 1000), (0, 900), (0, 750), (0, 500), (250, 750), (500, 1000))
NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN"}
FIGURES = {"right": ("accuracy", "{:.1%}"), "recall": ("recall", "{:.3f}"), "Frechet": ("frechet", "{:.2f}")}
COLUMNS = {f"{what}, {name}": form for what, (_, form) in FIGURES.items() for name in NAMES.values()}
DRAWN = {
    "count": (20, "images of each digit and domain"),
    "seed": (21, "seed of the noise"),
    "data": (DATA, "the course's digits, to compare with; without them only accuracy is measured"),
}
SHIPPED = {"weights": (WEIGHTS, "digit weights")} | DRAWN
SCALE, SCALES = {"scale": (6.0, "guidance scale")}, {"scales": ([1.0, 2.0, 4.0, 6.0, 8.0, 12.0], "guidance scales")}
STEPS = {"steps": ([5, 10, 20, 50], "numbers of steps")}
TRAINED = {
    **DRAWN,
    **RUNS,
    "scale": (2.0, "guidance scale"),
    "training_steps": (2400, "steps of each training"),
    "batch_size": (64, "images in a step"),
    "widths": ([64, 128], "channels of each level"),
}
FACTS = "{count} images of each digit and domain, seed {seed}, "
GUIDED = FACTS + "guidance {scale}, 10 steps of DPM-Solver++"
TRAINING = "Two trainings of {training_steps} steps of {batch_size} images, widths {widths}, rate 0.001, seed 0; then "


def judge(settings: Settings, ways: Iterable[tuple[str, DigitSampler, dict[str, Any]]]) -> Rows:
    """A row of figures for each way to draw (its name, sampler and options), and one of what real images get."""
    check("count", settings["count"], settings["count"] > 0, "above 0")
    judges = {domain: load_judge(JUDGES, domain) for domain in DOMAINS}
    real = read_real(None if settings["data"] == DATA else settings["data"])

    def row(variant: str, figures: dict[str, Any]) -> dict[str, Any]:
        cells = ((what, figure, domain) for what, (figure, _) in FIGURES.items() for domain in NAMES)
        return {"variant": variant} | {f"{what}, {NAMES[d]}": figures[d].get(figure) for what, figure, d in cells}

    rows = []
    for variant, sampler, options in ways:
        say(f"{variant} ...")
        sets = draw_sets(sampler, "2024", settings["count"], DigitOptions(seed=settings["seed"], **options))
        figures, yardsticks = measure(sets, judges, real)
        rows.append(row(variant, figures))
    yardstick = {name: part.get("training_images", {}) | part["held_out_images"] for name, part in yardsticks.items()}
    return [*rows, row("real images", yardstick)]


def measure_guidance(settings: Settings) -> Rows:
    """Guidance scale against accuracy and variety."""
    sampler = DigitSampler(settings["weights"])
    return judge(settings, ((f"{scale:g}", sampler, {"guidance_scale": scale}) for scale in settings["scales"]))


def measure_interval(settings: Settings) -> Rows:
    """Guidance at some timesteps only."""
    sampler, scale = DigitSampler(settings["weights"]), {"guidance_scale": settings["scale"]}
    ways = [(f"{low} to {high}", sampler, scale | {"guidance_interval": (low, high)}) for low, high in INTERVALS]
    return judge(settings, [*ways, ("nowhere", sampler, {"guidance_scale": 1.0})])


def measure_steps(settings: Settings) -> Rows:
    """Samplers and their number of steps."""
    sampler, scale = DigitSampler(settings["weights"]), {"guidance_scale": settings["scale"]}
    pairs = [(method, steps) for method in SAMPLERS for steps in settings["steps"]]
    return judge(settings, ((f"{m}, {steps}", sampler, scale | {"sampler": m, "steps": steps}) for m, steps in pairs))


class SeparateContext(nn.Module):
    """The row of a class as the sum of its domain's and its digit's; the null label has its own of each."""

    def __init__(self, width: int):
        super().__init__()
        self.domain, self.digit = nn.Embedding(3, width), nn.Embedding(11, width)
        # So that the sum starts as wide as a row of the joint table.
        for table in (self.domain, self.digit):
            nn.init.normal_(table.weight, std=0.5**0.5)

    def forward(self, labels: Tensor) -> Tensor:
        return self.domain(labels // 10) + self.digit(torch.where(labels < 20, labels % 10, 10))


def make_separate(config: ContextUNetConfig) -> ContextUNet:
    """A Context-UNet whose classes are told as domain plus digit."""
    model = ContextUNet(config)
    model.context = SeparateContext(config.embedding)
    return model


def joint_state(model: ContextUNet) -> dict[str, Tensor]:
    """The weights as those of a plain Context-UNet: sums of two rows are a joint table too, if a special one."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("context.")}
    labels = torch.arange(model.null_label + 1, device=next(model.parameters()).device)
    return state | {"context.weight": model.context(labels).detach()}


def measure_classes(settings: Settings) -> Rows:
    """Joint classes against separate embeddings of domain and digit."""

    def save(path: Path) -> Callable:
        return lambda averaged, facts: save_tensors(path, joint_state(averaged), facts)

    widths, ways, losses = settings["widths"], [], []
    config = DigitTraining(data=settings["data"], widths=widths, blocks=[1] * len(widths))
    options = TrainingOptions(steps=settings["training_steps"], batch_size=settings["batch_size"], lr=1e-3, **SHORT)
    for variant, make_model in {"joint: 20 rows": ContextUNet, "separate: 2 + 10 rows": make_separate}.items():
        path = train(replace(config, out=run_folder(settings, variant)), options, make_model, save)
        losses.append({"validation loss": load_about(path)["validation_loss"]})
        ways.append((variant, DigitSampler(path), {"guidance_scale": settings["scale"]}))
    *rows, real = judge(settings, ways)
    return [*(row | loss for row, loss in zip(rows, losses)), real]


P1 = {
    "p1-guidance": Ablation(
        measure_guidance, SHIPPED | SCALES, COLUMNS, FACTS + "10 steps of DPM-Solver++", "`guidance_scale`"
    ),
    "p1-interval": Ablation(measure_interval, SHIPPED | SCALE, COLUMNS, GUIDED, "`guidance_interval`"),
    "p1-steps": Ablation(measure_steps, SHIPPED | SCALE | STEPS, COLUMNS, FACTS + "guidance {scale}", "sampler, steps"),
    "p1-classes": Ablation(
        measure_classes, TRAINED, {"validation loss": "{:.4f}"} | COLUMNS, TRAINING + GUIDED, "classes"
    ),
}

"""Ablations of problem 1: guidance, its interval, samplers and steps."""

from collections.abc import Iterable
from typing import Any

from benchmarks.ablation_tables import Ablation, Rows, Settings
from common.cli import check, say
from p1_ddpm.digits import DATA, DOMAINS, read_real
from p1_ddpm.evaluate import draw_sets, measure
from p1_ddpm.judge import WEIGHTS as JUDGES
from p1_ddpm.judge import load_judge
from p1_ddpm.sample import WEIGHTS, DigitOptions, DigitSampler

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
FACTS = "{count} images of each digit and domain, seed {seed}, "
GUIDED = FACTS + "guidance {scale}, 10 steps of DPM-Solver++"


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


P1 = {
    "p1-guidance": Ablation(
        measure_guidance, SHIPPED | SCALES, COLUMNS, FACTS + "10 steps of DPM-Solver++", "`guidance_scale`"
    ),
    "p1-interval": Ablation(measure_interval, SHIPPED | SCALE, COLUMNS, GUIDED, "`guidance_interval`"),
    "p1-steps": Ablation(measure_steps, SHIPPED | SCALE | STEPS, COLUMNS, FACTS + "guidance {scale}", "sampler, steps"),
}

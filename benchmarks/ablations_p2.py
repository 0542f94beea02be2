"""Ablations of problem 2: number of steps, eta, the ground truth's conventions, and slerp against lerp."""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablation_tables import ERROR, Ablation, Rows, Settings
from common.cli import UserError
from common.runtime import pick_device
from p2_ddim import sample
from p2_ddim.evaluate import squared_errors
from p2_ddim.interpolate import METHODS
from p2_ddim.model import load_face_unet
from p2_ddim.noise import Noise
from p2_ddim.sample import EXAMPLES, WEIGHTS, noises_for
from p2_ddim.sampler import DDIMOptions, FaceSampler

DEVIATION = "{:.1f}"
# Contrast is not stretched here: a washed-out face is to be seen as one.
PLAIN = DDIMOptions(save_range="clamp")
CONVENTIONS = {
    "as the ground truth": (),
    "x0 not clamped": ("--no-clip-x0",),
    "trailing timesteps": ("--timestep-spacing", "trailing"),
    "last alphas_cumprod 1": ("--final-alpha", "one"),
    "saved without min-max": ("--save-range", "clamp"),
}
SHIPPED = {
    "weights": (WEIGHTS, "that draw"),
    "noise": (EXAMPLES / "noise", "folder of noises"),
}
FACTS = "All noises of {noise}"


def faces_of(settings: Settings) -> tuple[FaceSampler, list[Noise]]:
    """The sampler and the noises that the settings name, in fp32 as the ground truth."""
    sampler = FaceSampler(*load_face_unet(settings["weights"]), pick_device())
    return sampler, noises_for(sampler, settings["noise"])


def squared_error(drawn: Tensor, other: Tensor) -> float:
    """Mean squared error of uint8 images on the 0-255 scale."""
    return (drawn.double() - other.double()).square().mean().item()


def deviation(drawn: Tensor) -> float:
    """How much the pixels of an image differ from one another: the mean of their standard deviations, 0 to 127.5."""
    return drawn.double().flatten(1).std(dim=1).mean().item()


def measure_steps(settings: Settings) -> Rows:
    """How far few steps are from very many, with both ways to choose the timesteps."""
    sampler, noises = faces_of(settings)
    smooth = replace(PLAIN, timestep_spacing="trailing", final_alpha="one")
    truth = sampler.pictures(noises, replace(smooth, steps=settings["reference"]))
    rows = []
    for steps in settings["steps"]:
        ways = {"leading": PLAIN, "trailing": smooth}
        drawn = {name: sampler.pictures(noises, replace(way, steps=steps)) for name, way in ways.items()}
        rows.append({"variant": steps} | {name: squared_error(images, truth) for name, images in drawn.items()})
    return rows


def measure_eta(settings: Settings) -> Rows:
    """What fresh noise does: how far the faces move from those without it, and from one another between seeds."""
    sampler, noises = faces_of(settings)
    plain = replace(PLAIN, steps=settings["steps"])
    still = sampler.pictures(noises, plain)
    rows = []
    for eta in settings["etas"]:
        first, second = (sampler.pictures(noises, replace(plain, eta=eta, seed=settings["seed"] + k)) for k in range(2))
        rows.append({
            "variant": f"{eta:g}", "moved": squared_error(first, still), "apart": squared_error(first, second),
            "deviation": deviation(first),
        })  # fmt: skip
    return rows


def measure_conventions(settings: Settings) -> Rows:
    """Squared errors against the ground truth with one of its conventions left out at a time."""
    rows = []
    for variant, flags in CONVENTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(path) for path in (settings["noise"], Path(folder) / "out", settings["weights"])]
            sample.main(sample.parse_arguments([*paths, "--steps", str(settings["steps"]), *flags]))
            errors = squared_errors(Path(folder) / "out", settings["truth"]).values()
        rows.append({"variant": variant, "mean": sum(errors) / len(errors), "largest": max(errors)})
    return rows


def measure_slerp(settings: Settings) -> Rows:
    """Lengths of the noises between two, and how much the pixels of the faces drawn from them differ."""
    sampler, noises = faces_of(settings)
    if len(noises) < 2:
        raise UserError(f"{settings['noise']}: holds one noise; what lies between takes two")
    pairs, options = list(pairwise(noises)), replace(PLAIN, steps=settings["steps"])
    shell = math.sqrt(noises[0].xt.numel())
    rows = []
    for alpha in settings["alphas"]:
        row = {"variant": f"{alpha:g}"}
        for name, way in METHODS.items():
            path = [Noise(f"{a.name}-{b.name}", way(a.xt, b.xt, alpha)) for a, b in pairs]
            length = torch.stack([noise.xt.norm() for noise in path]).mean().item()
            faces = sampler.pictures(path, options)
            row |= {f"{name}_length": length / shell, f"{name}_deviation": deviation(faces)}
        rows.append(row)
    return rows


def ablations() -> Iterable[tuple[str, Ablation]]:
    """The ablations of this problem by their names."""
    page, weights, steps = "p2.md", ("weights",), {"steps": (50, "of the reverse process")}
    yield "p2-steps", Ablation(
        page, "few steps against very many",
        SHIPPED | {"steps": ([5, 10, 20, 50, 100], "numbers of steps"), "reference": (1000, "steps to compare with")},
        measure_steps, {"leading": ("leading", ERROR), "trailing": ("trailing", ERROR)},
        "Mean squared error on the 0-255 scale against {reference} trailing steps. " + FACTS + ", eta 0",
        "`steps`", weights,
    )  # fmt: skip
    yield "p2-eta", Ablation(
        page, "fresh noise in every step",
        SHIPPED | steps | {"etas": ([0.0, 0.25, 0.5, 0.75, 1.0], "etas"), "seed": (21, "of the fresh noise")},
        measure_eta,
        {
            "from eta 0": ("moved", ERROR), "between two seeds": ("apart", ERROR),
            "deviation of pixels": ("deviation", DEVIATION),
        },
        "Mean squared errors on the 0-255 scale. " + FACTS + ", {steps} steps, seed {seed} and the next", "`eta`",
        weights,
    )  # fmt: skip
    yield "p2-conventions", Ablation(
        page, "the ground truth's conventions, left out one at a time",
        SHIPPED | steps | {"truth": (EXAMPLES / "GT", "folder of the ground truth of these noises and weights")},
        measure_conventions, {"mean": ("mean", ERROR), "largest": ("largest", ERROR)},
        "Mean squared error of an image on the 0-255 scale against {truth}. " + FACTS + ", {steps} steps, eta 0",
        "", weights,
    )  # fmt: skip
    yield "p2-slerp", Ablation(
        page, "slerp against lerp",
        SHIPPED | steps | {"alphas": ([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], "points of the way")},
        measure_slerp,
        {
            "length, slerp": ("slerp_length", "{:.3f}"), "length, lerp": ("lerp_length", "{:.3f}"),
            "deviation of pixels, slerp": ("slerp_deviation", DEVIATION),
            "deviation of pixels, lerp": ("lerp_deviation", DEVIATION),
        },
        "Lengths over sqrt(D); means over all neighbours. " + FACTS + ", {steps} steps, eta 0", "`alpha`", weights,
    )  # fmt: skip


P2 = dict(ablations())

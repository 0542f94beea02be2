"""Ablations of problem 2: number of steps, eta, the ground truth's conventions, and slerp against lerp."""

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.ablation_tables import Ablation, Rows, Settings
from common.cli import UserError
from common.data import stack_images
from common.images import read_image
from common.runtime import pick_device
from p2_ddim.model import load_face_unet
from p2_ddim.noise import METHODS, Noise
from p2_ddim.sample import EXAMPLES, WEIGHTS, noises_for
from p2_ddim.sampler import DDIMOptions, FaceSampler

ERROR = "{:.4g}"
# Contrast is not stretched here, so that a washed-out face shows as one.
PLAIN = DDIMOptions(save_range="clamp")
CONVENTIONS = {
    "as the ground truth": {},
    "x0 not clamped": {"clip_x0": False},
    "trailing timesteps": {"timestep_spacing": "trailing"},
    "last alphas_cumprod 1": {"final_alpha": "one"},
    "saved without min-max": {"save_range": "clamp"},
}
FROM = {"weights": (WEIGHTS, "face weights"), "noise": (EXAMPLES / "noise", "folder of noises")}
STEPS = FROM | {"steps": (50, "steps of the reverse process")}


def load_faces(settings: Settings) -> tuple[FaceSampler, list[Noise]]:
    """The sampler, in fp32 as the ground truth, and the noises that the settings name."""
    sampler = FaceSampler(*load_face_unet(settings["weights"]), pick_device())
    return sampler, noises_for(sampler, settings["noise"])


def squared_error(drawn: Tensor, other: Tensor) -> float:
    """The mean squared error on the 0-255 scale."""
    return (drawn.double() - other.double()).square().mean().item()


def deviation(drawn: Tensor) -> float:
    """The mean standard deviation of the pixels within an image, 0 to 127.5."""
    return drawn.double().flatten(1).std(dim=1).mean().item()


def measure_steps(settings: Settings) -> Rows:
    """Few steps against very many, with both ways to choose the timesteps."""
    sampler, noises = load_faces(settings)
    ways = {"leading": PLAIN, "trailing": replace(PLAIN, timestep_spacing="trailing", final_alpha="one")}
    truth, rows = sampler.pictures(noises, replace(ways["trailing"], steps=settings["reference"])), []
    for steps in settings["steps"]:
        drawn = {name: sampler.pictures(noises, replace(way, steps=steps)) for name, way in ways.items()}
        rows.append({"variant": steps} | {name: squared_error(images, truth) for name, images in drawn.items()})
    return rows


def measure_eta(settings: Settings) -> Rows:
    """Fresh noise in every step: how far it moves the faces, and those of two seeds from one another."""
    sampler, noises = load_faces(settings)
    plain = replace(PLAIN, steps=settings["steps"])
    still = sampler.pictures(noises, plain)
    rows = []
    for eta in settings["etas"]:
        first, second = (sampler.pictures(noises, replace(plain, eta=eta, seed=settings["seed"] + k)) for k in range(2))
        moved, apart = squared_error(first, still), squared_error(first, second)
        row = {"from eta 0": moved, "between two seeds": apart, "deviation of pixels": deviation(first)}
        rows.append({"variant": f"{eta:g}"} | row)
    return rows


def measure_conventions(settings: Settings) -> Rows:
    """The ground truth's conventions, left out one at a time."""
    sampler, noises = load_faces(settings)
    paths = [settings["truth"] / f"{noise.name}.png" for noise in noises]
    truth = stack_images([read_image(path, size=None) for path in paths])
    rows = []
    for variant, left_out in CONVENTIONS.items():
        drawn = sampler.pictures(noises, DDIMOptions(steps=settings["steps"], **left_out))
        errors = [squared_error(*pair) for pair in zip(drawn, truth, strict=True)]
        rows.append({"variant": variant, "mean": sum(errors) / len(errors), "largest": max(errors)})
    return rows


def measure_slerp(settings: Settings) -> Rows:
    """Slerp against lerp: the lengths of the noises between two, and how much the pixels of their faces differ."""
    sampler, noises = load_faces(settings)
    if len(noises) < 2:
        raise UserError(f"{settings['noise']}: holds one noise; give two or more")
    shell, plain, rows = math.sqrt(noises[0].xt.numel()), replace(PLAIN, steps=settings["steps"]), []
    for alpha in settings["alphas"]:
        row = {"variant": f"{alpha:g}"}
        for name, way in METHODS.items():
            path = [Noise(f"{a.name}-{b.name}", way(a.xt, b.xt, alpha)) for a, b in pairwise(noises)]
            row[f"length, {name}"] = torch.stack([noise.xt.norm() for noise in path]).mean().item() / shell
            row[f"deviation of pixels, {name}"] = deviation(sampler.pictures(path, plain))
        rows.append(row)
    return rows


P2 = {
    "p2-steps": Ablation(
        measure_steps,
        FROM | {"steps": ([5, 10, 20, 50, 100], "numbers of steps"), "reference": (1000, "steps to compare with")},
        {"leading": ERROR, "trailing": ERROR},
        "Mean squared error on the 0-255 scale against {reference} trailing steps. All noises of {noise}, eta 0",
        "`steps`",
    ),
    "p2-eta": Ablation(
        measure_eta,
        STEPS | {"etas": ([0.0, 0.25, 0.5, 0.75, 1.0], "values of eta"), "seed": (21, "seed of the fresh noise")},
        {"from eta 0": ERROR, "between two seeds": ERROR, "deviation of pixels": "{:.1f}"},
        "Mean squared errors on the 0-255 scale. All noises of {noise}, {steps} steps, seed {seed} and the next",
        "`eta`",
    ),
    "p2-conventions": Ablation(
        measure_conventions,
        STEPS | {"truth": (EXAMPLES / "GT", "ground truth of these noises and weights")},
        {"mean": ERROR, "largest": ERROR},
        "Mean squared error of an image on the 0-255 scale against {truth}. All noises of {noise}, {steps} steps,"
        " eta 0",
    ),
    "p2-slerp": Ablation(
        measure_slerp,
        STEPS | {"alphas": ([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], "points of the way")},
        {f"length, {name}": "{:.3f}" for name in METHODS}
        | {f"deviation of pixels, {name}": "{:.1f}" for name in METHODS},
        "Lengths over sqrt(D); means over all neighbours. All noises of {noise}, {steps} steps, eta 0",
        "`alpha`",
    ),
}

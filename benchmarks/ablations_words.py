"""The ablation of personalization: matrices beside the words, and pictures of the class beside the concepts'."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.ablation_tables import ERROR, Ablation, Rows, Settings, fingerprint, told
from benchmarks.ablation_training import RUNS, run_folder
from common.checkpoint import write_atomically
from common.cli import UserError, say
from common.runtime import pick_device
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import draw_prompts
from latent_diffusion.miniature.regions import NEAR, concept_colour, disc_difference
from latent_diffusion.miniature.scenes import random_scenes
from p3_controlnet.sample import BASE
from p3_personalization import custom_diffusion, textual_inversion
from p3_personalization.custom_diffusion import load_custom
from p3_personalization.evaluate import read_references
from p3_personalization.generate import EXAMPLES
from p3_personalization.words import add_words, load_words

SCENE_SIZE = 128  # pixels; only the scenes' prompts are used
CLASS_PROMPTS = 100
STEPS, GUIDANCE_SCALE = 20, 2.0
SHOWN_ON = "{} circle with white background"
CONCEPTS = {"<new1>": ("0", "purple"), "<new2>": ("1", "olive")}
# From a variant to the part of its batches that are pictures of the class; words alone have no matrices to forget with.
VARIANTS = {"words alone": None, "words and matrices": 0.5, "the same without pictures of the class": 0.0}


def ordinary_prompts(count: int, seed: int, held_out: bool) -> list[str]:
    """Prompts of circles in named colours, with no learned word; held-out ones are of pairs that nothing trained on."""
    return [scene.prompt for scene in random_scenes(count, SCENE_SIZE, seed, (1, 2), held_out)]


def learned(settings: Settings, base: Base, variant: str) -> Base:
    """The base that knows the concepts, learned anew or from a run that is finished."""
    out, share = settings["out"], VARIANTS[variant]
    facts = {name: told(value) for name, value in settings.items() if name not in ("out", "count")}
    facts |= {name: fingerprint(settings[name]) for name in ("base", "concepts")}
    folder = run_folder(out, variant, facts)
    numbers = {"--steps": "steps", "--batch-size": "batch_size", "--seed": "seed"}
    flags = [str(settings["concepts"] / number) for number, _ in CONCEPTS.values()]
    flags += [*("--initialiser", *(word for _, word in CONCEPTS.values())), *("--base", str(settings["base"]))]
    flags += [part for flag, name in numbers.items() for part in (flag, str(settings[name]))]
    flags += [*("--sample-every", str(settings["steps"] + 1)), *("--out", str(folder))]
    say(f"{variant}: in {folder}")
    if share is None:
        path = textual_inversion.main(textual_inversion.parse_arguments(flags))
        return add_words(base, load_words(path))
    prompts = "\n".join(ordinary_prompts(CLASS_PROMPTS, settings["seed"], held_out=False)) + "\n"
    file = folder / "class.txt"
    write_atomically(file, lambda temporary: temporary.write_text(prompts))
    flags += ["--class-share", str(share), "--class-prompts", str(file), "--class-images", str(CLASS_PROMPTS)]
    return load_custom(base, custom_diffusion.main(custom_diffusion.parse_arguments(flags)))


def drawn(base: Base, prompts: list[str], seed: int) -> Tensor:
    """A picture of each prompt: uint8 (N, 3, H, W)."""
    return draw_prompts(base, prompts, [(seed, k) for k in range(len(prompts))], STEPS, GUIDANCE_SCALE)


def concept_differences(base: Base, colours: dict[str, np.ndarray], count: int, seed: int) -> list[float]:
    """CIEDE2000 from each concept's colour to the disc most like it, in so many pictures of each word."""
    differences = []
    for token, colour in colours.items():
        pictures = drawn(base, [SHOWN_ON.format(token)] * count, seed).permute(0, 2, 3, 1).numpy()
        differences += [disc_difference(picture, colour) for picture in pictures]
    return differences


def colours_of(concepts: Path) -> dict[str, np.ndarray]:
    """The colour of each concept's disc.

    Raises:
        UserError: its pictures are missing, or show no disc.
    """
    colours = {token: concept_colour(read_references(concepts / number)) for token, (number, _) in CONCEPTS.items()}
    for token, colour in colours.items():
        if colour is None:
            raise UserError(f"{concepts / CONCEPTS[token][0]}: not all its pictures show a disc; name other concepts")
    return colours


def measure_prior(settings: Settings) -> Rows:
    """How well each variant learns the concepts, and how much it changes what has nothing to do with them."""
    if settings["count"] < 1:
        raise UserError(f"--count {settings['count']}: starts at 1")
    base, colours = load_base(settings["base"], pick_device()), colours_of(settings["concepts"])
    prompts = ordinary_prompts(settings["count"], settings["seed"] + 1, held_out=True)
    before = drawn(base, prompts, settings["seed"])
    rows = []
    for variant in VARIANTS:
        knowing = learned(settings, replace(base), variant)
        after = drawn(knowing, prompts, settings["seed"])
        differences = np.asarray(concept_differences(knowing, colours, settings["count"], settings["seed"]))
        median = float(np.median(differences))
        rows.append({
            "variant": variant, "difference": median if np.isfinite(median) else None,
            "near": float((differences <= NEAR).mean()),
            "moved": (after.double() - before.double()).square().mean().item(),
        })  # fmt: skip
    return rows


def ablations() -> Iterable[tuple[str, Ablation]]:
    """The ablation by its name."""
    yield "p3-prior", Ablation(
        "p3.md", "matrices beside the words, and pictures of the class",
        {
            "steps": (400, "of each training"), "batch_size": (16, "pictures a step"),
            "seed": (0, "of order and noise, and of what is drawn"),
            "count": (25, "pictures of each concept, and of ordinary prompts"),
            "concepts": (EXAMPLES, "folder of both concepts' pictures"), "base": (BASE, "the frozen model"), **RUNS,
        },
        measure_prior,
        {
            "difference from the concept": ("difference", "{:.1f}"), f"within {NEAR:g}": ("near", "{:.0%}"),
            "change of ordinary prompts": ("moved", ERROR),
        },
        "Each trained for {steps} steps of {batch_size} pictures, seed {seed}; {count} pictures of each concept and of"
        f" ordinary prompts, guidance {GUIDANCE_SCALE:g}. Difference: CIEDE2000 of the disc most like the concept, the"
        " median; change: mean squared error on the 0-255 scale", "", ("base",),
    )  # fmt: skip


WORDS = dict(ablations())

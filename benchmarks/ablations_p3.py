"""Ablations of problem 3: the ControlNet's zero convolutions and hint encoder, and what Custom Diffusion adds."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from benchmarks.ablation_tables import RUNS, SHORT, Ablation, Rows, Settings, run_folder
from common.cli import check, say
from common.layers import zero_init
from common.runtime import pick_device
from common.training_options import TrainingOptions
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.miniature import BASE
from latent_diffusion.miniature.regions import NEAR, concept_colour, disc_difference
from latent_diffusion.miniature.scenes import random_scenes
from p3_controlnet import fill50k
from p3_controlnet.model import ControlNet
from p3_controlnet.train import ControlNetTraining, make_controlnet, train
from p3_personalization import custom_diffusion, textual_inversion
from p3_personalization.evaluate import read_references
from p3_personalization.generate import EXAMPLES, read_table
from p3_personalization.learning import ConceptOptions
from p3_personalization.words import add_words, load_custom, load_words

IOU = [f"hint IoU, {part}" for part in ("a third of the steps", "two thirds", "all")]
CHANGES = "difference from the concept", f"within {NEAR:g}", "change of ordinary prompts"
CONTROLNET = {"hint_channels": (16, 32, 48, 64), "guidance_scale": 2.0, "watched": 32, "validated": 128}
DRAWING = PromptOptions(steps=20, guidance_scale=2.0)
SCENE_SIZE = 128  # pixels; only the scenes' prompts are used
CLASS_IMAGES = 100
STARTS = {"0": "purple", "1": "olive"}  # the concepts' folders, and the words that training starts from


def without_zeros(config: ControlNetTraining, base: Base) -> ControlNet:
    """A new ControlNet with all its zero convolutions drawn like ordinary ones."""
    controlnet = make_controlnet(config, base)
    last = controlnet.controlnet_cond_embedding.conv_out
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, last):
        convolution.reset_parameters()
    return controlnet


def with_pooled_hint(config: ControlNetTraining, base: Base, learned: bool = True) -> ControlNet:
    """A new ControlNet whose hint is averaged over the pixels of a latent, then goes through one zero convolution."""
    controlnet = make_controlnet(config, base)
    sizes = controlnet.config
    convolution = zero_init(nn.Conv2d(sizes.conditioning_channels, sizes.block_out_channels[0], 3, padding=1))
    pool = nn.AvgPool2d(sizes.hint_factor)
    controlnet.controlnet_cond_embedding = nn.Sequential(pool, convolution.requires_grad_(learned))
    return controlnet


def without_hint(config: ControlNetTraining, base: Base) -> ControlNet:
    """A new ControlNet to which the hint never gets through."""
    return with_pooled_hint(config, base, learned=False)


def train_each(settings: Settings, variants: Mapping[str, Callable]) -> Rows:
    """Train a ControlNet of each kind on the same circles."""
    steps, pairs, size, rows = settings["steps"], settings["pairs"], settings["size"], []
    check("steps", steps, steps >= len(IOU), f"at least {len(IOU)}")
    data = settings["out"] / f"circles-{pairs}-{size}"
    if not data.exists():
        fill50k.main(fill50k.parse_arguments([str(data), "--count", str(pairs), "--size", str(size)]))
    config = ControlNetTraining(base=settings["base"], data=data, latents=data / "cache", **CONTROLNET)
    often = {"validate_every": steps // len(IOU), "sample_every": steps}
    options = TrainingOptions(
        steps=steps, batch_size=settings["batch_size"], lr=1e-3, seed=settings["seed"], **often, **SHORT
    )
    for variant, make in variants.items():
        folder, logs = run_folder(settings, variant), []
        # The first one learns nothing: it measures the loss before.
        for out, chosen in ((folder / "before", replace(options, steps=1, lr=0.0)), (folder, options)):
            train(replace(config, out=out), chosen, make)
            lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            logs.append([line for line in lines if "hint_iou" in line])
        (before,), (first, second, *_, last) = logs
        row = {"variant": variant, "loss before": before["validation_loss"], "after": last["validation_loss"]}
        row["sensitivity"] = last["condition_sensitivity"]
        rows.append(row | {heading: line["hint_iou"] for heading, line in zip(IOU, (first, second, last))})
    return rows


def measure_zero(settings: Settings) -> Rows:
    """Zero convolutions against ordinary ones."""
    return train_each(settings, {"as built": make_controlnet, "ordinary convolutions": without_zeros})


def measure_hint(settings: Settings) -> Rows:
    """The hint encoder against a pooled hint and none."""
    variants = {"as built": make_controlnet, "pooled hint, one convolution": with_pooled_hint, "no hint": without_hint}
    return train_each(settings, variants)


def learn_concepts(settings: Settings, base: Base, variant: str, class_share: float | None) -> Base:
    """The base that knows the concepts, with matrices beside the words where there is a share of class pictures."""
    kind = textual_inversion if class_share is None else custom_diffusion
    chosen = {name: settings[name] for name in ("steps", "batch_size", "seed")} | {"sample_every": 10**9}
    options = TrainingOptions(**kind.DEFAULTS | chosen)
    own = {"images": [EXAMPLES / number for number in STARTS], "initialiser": [*STARTS.values()]}
    own |= {"base": settings["base"], "out": run_folder(settings, variant)}
    say(f"{variant}: in {own['out']}")
    if class_share is None:
        return add_words(base, load_words(kind.train(ConceptOptions(**own), options)))
    config = kind.CustomOptions(**own, class_share=class_share, class_images=CLASS_IMAGES)
    return load_custom(base, kind.train(config, options))


def measure_prior(settings: Settings) -> Rows:
    """Matrices beside the words, and pictures of the class."""
    count, seed = settings["count"], settings["seed"]
    check("count", count, count > 0, "above 0")
    base, options = load_base(settings["base"], pick_device()), replace(DRAWING, seed=seed)
    entries = read_table(EXAMPLES / "input.json")
    colours = {n: concept_colour(photos, n) for n, photos in read_references(EXAMPLES, entries).items()}
    # Colour pairs that nothing was trained on, and no learned word.
    scenes = random_scenes(count, SCENE_SIZE, seed + 1, (1, 2), held_out=True)
    ordinary = [(scene.prompt, (k,)) for k, scene in enumerate(scenes)]
    before, rows = draw_prompts(base, ordinary, options), []
    # The share of a batch that are pictures of the class; words alone have no matrices that could forget.
    variants = {"words alone": None, "words and matrices": 0.5, "the same without pictures of the class": 0.0}
    for variant, share in variants.items():
        knowing = learn_concepts(settings, replace(base), variant, share)
        after, differences = draw_prompts(knowing, ordinary, options), []
        for entry in entries:
            items = [(f"{entry.token} circle with white background", (k,)) for k in range(count)]
            pictures = draw_prompts(knowing, items, options).permute(0, 2, 3, 1).numpy()
            differences += [disc_difference(picture, colours[entry.number]) for picture in pictures]
        median, near = float(np.median(differences)), float((np.asarray(differences) <= NEAR).mean())
        change = (after.double() - before.double()).square().mean().item()
        figures = median if np.isfinite(median) else None, near, change
        rows.append({"variant": variant} | dict(zip(CHANGES, figures)))
    return rows


TRAINED = {"base": (BASE, "the frozen model"), "seed": (0, "seed of weights, order and noise")} | RUNS
CIRCLES = TRAINED | {
    "steps": (300, "steps of each training"),
    "batch_size": (64, "pairs in a step"),
    "pairs": (3000, "circles to draw and train on, less every eleventh"),
    "size": (128, "side of the pictures, pixels"),
}
WORDS = TRAINED | {
    "steps": (400, "steps of each training"),
    "batch_size": (16, "pictures in a step"),
    "count": (25, "pictures of each concept, and of ordinary prompts"),
}
WATCHED = dict.fromkeys(("loss before", "after", "sensitivity"), "{:.4f}") | dict.fromkeys(IOU, "{:.3f}")
CIRCLE_FACTS = (
    "Each trained for {steps} steps of {batch_size} pairs on {pairs} circles, rate 0.001, seed {seed}, hint encoder"
    " 16 32 48 64; loss of 128 held-out pairs, IoU of 32 drawn with guidance 2"
)
WORD_FACTS = (
    "Each trained for {steps} steps of {batch_size} pictures, seed {seed}; {count} pictures of each concept and of"
    " ordinary prompts, guidance 2. Difference: CIEDE2000 of the disc most like the concept, the median; change:"
    " mean squared error on the 0-255 scale"
)
P3 = {
    "p3-zero": Ablation(measure_zero, CIRCLES, WATCHED, CIRCLE_FACTS),
    "p3-hint": Ablation(measure_hint, CIRCLES, WATCHED, CIRCLE_FACTS),
    "p3-prior": Ablation(measure_prior, WORDS, dict(zip(CHANGES, ("{:.1f}", "{:.0%}", "{:.4g}"))), WORD_FACTS),
}

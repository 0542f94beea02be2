"""The tables of the report, read from what the evaluations wrote and from what weights files remember."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import load_about
from docs.report.page import Table

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = {"mnistm": "MNIST-M", "svhn": "SVHN"}
DISTANCES = ("frechet", "precision", "recall")


def shown(path: Path) -> str:
    """A path as a reader would type it in the repository's folder."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def decimal(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def digit_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row a domain, and the mean of both."""
    rows = [
        [label, percent(figures[domain]["accuracy"]), *(decimal(figures[domain].get(name)) for name in DISTANCES)]
        for domain, label in DOMAINS.items()
    ]
    return [*rows, ["mean", percent(figures["score"]), *["-"] * len(DISTANCES)]]


def digits_now(file: Path) -> list[Table]:
    """What `p1_ddpm/evaluate.py` measured on the graded images."""
    result = json.loads(file.read_text().splitlines()[-1])
    rows = digit_rows(result)
    for domain, label in DOMAINS.items():
        if "yardstick" in result[domain]:
            yardstick = result[domain]["yardstick"]
            rows.append([f"{label}, training images", "-", *(decimal(yardstick.get(name)) for name in DISTANCES)])
        rows.append([f"{label}, held-out images", percent(result[domain]["judge_held_out_accuracy"]), "-", "-", "-"])
        if "classifier_accuracy" in result[domain]:
            rows.append(
                [f"{label}, course's classifier", percent(result[domain]["classifier_accuracy"]), "-", "-", "-"]
            )
    images = sum(result[domain]["images"] for domain in DOMAINS)
    caption = f"The {images} graded images, layout {result['layout']}"
    return [Table(caption, ["", "judged right", "Frechet", "precision", "recall"], rows, shown(file))]


def digits_recorded(weights: Path, layout: str) -> list[Table]:
    """What `p1_ddpm/evaluate.py --record` left in the weights file; nothing if it was never called."""
    figures = load_about(weights).get("figures", {}).get(layout) if weights.suffix == ".safetensors" else None
    if not figures:
        return []
    seeds = " ".join(map(str, figures["seeds"]))
    caption = (
        f"Mean of seeds {seeds}; {figures['steps']} steps of {figures['sampler']}, guidance"
        f" {figures['guidance_scale']:g}"
    )
    source = f"{shown(weights)}, where evaluate.py --seeds {seeds} --layout {layout} --record left it"
    return [Table(caption, ["", "judged right", "Frechet", "precision", "recall"], digit_rows(figures), source)]


def squared_errors(file: Path) -> list[Table]:
    """What `p2_ddim/evaluate.py` measured against the ground truth."""
    errors = json.loads(file.read_text())
    rows = [[name, decimal(error, 4)] for name, error in errors.items()]
    return [Table("Mean squared error, 0-255 scale", ["", "MSE"], rows, shown(file))]


def circle_summary(file: Path) -> list[Table]:
    """What `p3_controlnet/evaluate.py` measured over all pictures."""
    summary = json.loads(file.read_text())["summary"]
    names = {
        "iou": ("IoU of the area at the image's centre", decimal),
        "disc_iou": ("IoU of all discs", decimal),
        "disc_right": ("disc within CIEDE2000 10 of its colour", percent),
        "background_right": ("background within 10", percent),
        "colours_right": ("all colours within 10", percent),
        "names_right": ("all colours nearest to the named ones", percent),
        "cosine": ("CLIP cosine of picture and prompt", decimal),
        "score_best": ("IoU (cos + 1) / 2, ten best", decimal),
        "score_all": ("IoU (cos + 1) / 2, all", decimal),
    }
    rows = [[label, form(summary[name])] for name, (label, form) in names.items() if name in summary]
    return [Table(f"{summary['images']} pictures", ["", ""], rows, shown(file))]


def several_circles(file: Path) -> list[Table]:
    """What `p3_controlnet/evaluate.py` measured of pictures with more discs than one, a row an area."""
    rows = []
    for picture in json.loads(file.read_text())["images"]:
        if len(picture["discs"]) < 2:
            continue
        rows.append([picture["prompt"], "", "", "", ""])
        named = [(f"disc {k}", disc) for k, disc in enumerate(picture["discs"], start=1)]
        for label, area in (*named, ("background", picture["background"])):
            rows.append(
                [
                    f"\u2003{label}",
                    decimal(area["iou"]),
                    area["named"] or "-",
                    area["nearest"],
                    decimal(area["difference"], 1),
                ]
            )
    return [Table("Place and colours, by area", ["", "IoU", "prompt says", "drawn", "CIEDE2000"], rows, shown(file))]


def zero_shot(file: Path) -> list[Table]:
    """What `p3_personalization/zeroshot.py` measured."""
    result = json.loads(file.read_text())
    rows = [["top-1", percent(result["top1"])], ["top-5", percent(result["top5"])]]
    rows += [["classes", str(len(result["confusion"]))], ["pictures", str(sum(map(sum, result["confusion"])))]]
    rows += [["CLIP", shown(result["clip"])]]
    return [Table("Zero-shot classification", ["", ""], rows, shown(file))]


def learned_words(file: Path) -> list[Table]:
    """What `p3_personalization/evaluate.py` measured, a row a prompt."""
    rows = []
    for row in json.loads(file.read_text()):
        baseline = row.get("baseline")
        rows.append(
            [
                row["prompt"],
                decimal(row["image"], 2),
                decimal(row["text"], 2),
                "{:g}, {:g}".format(*baseline) if baseline else "-",
                {True: "yes", False: "no", None: "-"}[row.get("passed")],
                percent(row.get("near"), 0),
            ]
        )
    head = ["prompt", "image", "text", "baseline", "passed", "colour within 10"]
    return [Table("100 x cosine to the photos and to the prompt, five best pictures", head, rows, shown(file))]


def two_concepts(file: Path) -> list[Table]:
    """How many pictures show both concepts, as `p3_personalization/figures.py` counted them."""
    numbers: dict[str, Any] = json.loads(file.read_text())
    known = {"prompt", "count", "seed"}
    rows: Sequence[Sequence[str]] = [[name, percent(v, 0)] for name, v in numbers.items() if name not in known]
    caption = f"Of {numbers['count']} pictures of \u201c{numbers['prompt']}\u201d"
    return [Table(caption, ["", "show both"], rows, shown(file))] if rows else []

"""Name what pictures show without training for it: CLIP compares them with sentences, one or several a class.

python zeroshot.py hw2_data/clip_zeroshot --clip FOLDER     # the course's: id2label.json and val/{class}_{n}.png
python zeroshot.py                                          # colours of held-out circles, by the CLIP of the miniature

Prints the share of pictures whose class comes first (top-1) and among the first five (top-5). OUT gets confusion.png
and examples.png: five successes and five failures, with the five classes that CLIP thinks likeliest.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import Parser, UserError, add_json_argument, check_json, run, write_json
from common.images import check_output_folder, staged
from common.runtime import PRECISIONS, pick_device, pick_precision
from latent_diffusion.clip import Clip
from latent_diffusion.miniature.colours import COLOURS
from p3_personalization.labelled import Examples, circle_examples, distinct_colours, read_examples

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "latent_diffusion" / "miniature" / "weights" / "clip"
TEMPLATE = "A photo of a {}."  # what most of CLIP's zero-shot results were made with
COMBINATIONS = ("mean", "best")
PICTURES_AT_ONCE = 256
BEST = 5
SHOWN = 5


def class_scores(clip: Clip, examples: Examples, templates: Sequence[str], combine: str) -> Tensor:
    """How well each class fits each picture: cosines, float32 (N, classes) (Radford et al. 2021, section 3.1.4).

    Args:
        clip: the model.
        examples: the pictures and classes.
        templates: sentences in which {} stands for the class.
        combine: "mean" compares with the mean of a class's sentences, as unit vectors; "best" takes the sentence that
            fits best, for templates that also say what else there may be to see.
    """
    sentences = [
        clip.embed_texts([template.replace("{}", name) for name in examples.classes]) for template in templates
    ]
    if combine == "mean":
        sentences = [F.normalize(torch.stack(sentences).mean(dim=0), dim=-1)]
    rows = []
    for start in range(0, len(examples), PICTURES_AT_ONCE):
        numbers = range(start, min(start + PICTURES_AT_ONCE, len(examples)))
        pictures = clip.embed_images([examples.read(k) for k in numbers])
        best = pictures @ sentences[0].T
        for vectors in sentences[1:]:
            best = torch.maximum(best, pictures @ vectors.T)
        rows.append(best)
    return torch.cat(rows)


def figures_of(scores: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy of the best and of the five best, accuracy by class, and the confusion matrix.

    Args:
        scores: (N, classes).
        labels: int64 (N,).
        classes: their names.
    """
    ranked = scores.topk(min(BEST, len(classes)), dim=1).indices
    right = ranked == labels[:, None]
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, ranked[:, 0]), torch.tensor(1), accumulate=True)
    return {
        "pictures": len(labels),
        "classes": len(classes),
        "top1": right[:, 0].double().mean().item(),
        "top5": right.any(dim=1).double().mean().item(),
        "by_class": {
            name: int(row[k]) / int(row.sum()) for k, (name, row) in enumerate(zip(classes, confusion)) if row.sum()
        },
        "confusion": confusion.tolist(),
    }


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str):
    """A matplotlib figure of the share of each class's pictures (rows) that were given each name (columns)."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    counts = np.asarray(confusion, dtype=np.float64)
    side = 3 + 0.17 * len(classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(shown, ax=axes, shrink=0.6)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set(xlabel="named by CLIP", ylabel="class", title=title)
    return figure


def chosen_examples(right: Tensor, labels: Tensor) -> list[int]:
    """The first pictures of which a truth value holds, each of another class while there are enough classes."""
    numbers = right.nonzero()[:, 0].tolist()
    first = dict(reversed([(int(labels[k]), k) for k in numbers]))
    others = [k for k in numbers if k not in first.values()]
    return sorted([*sorted(first.values()), *others][:SHOWN])


def examples_figure(examples: Examples, scores: Tensor, scale: float):
    """A matplotlib figure of successes (left) and failures (right), each picture beside its five likeliest classes.

    Bars are the softmax of the scores times CLIP's own scale, over all classes; the true class is green.
    """
    from matplotlib.figure import Figure

    probabilities = (scale * scores).softmax(dim=1)
    hits = scores.argmax(dim=1) == examples.labels
    figure = Figure(figsize=(11, 2 * SHOWN), layout="constrained")
    grid = figure.subplots(SHOWN, 4, width_ratios=(1, 1.4, 1, 1.4), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for side, (word, chosen) in enumerate({"success": hits, "failure": ~hits}.items()):
        for row, k in enumerate(chosen_examples(chosen, examples.labels)):
            picture, bars = grid[row, 2 * side : 2 * side + 2]
            label = int(examples.labels[k])
            picture.imshow(examples.read(k))
            picture.set_title(f"{word}: {examples.classes[label]}", fontsize=9)
            likeliest = probabilities[k].topk(min(BEST, len(examples.classes)))
            numbers = likeliest.indices.tolist()
            drawn = bars.barh(
                range(len(numbers)),
                (100 * likeliest.values).tolist(),
                color=["tab:green" if number == label else "tab:gray" for number in numbers],
            )
            bars.bar_label(drawn, fmt="%.1f %%", fontsize=8, padding=2)
            bars.axis("on")
            bars.set_yticks(range(len(numbers)), [examples.classes[number] for number in numbers], fontsize=8)
            bars.set(xlim=(0, 118), xticks=[])
            bars.invert_yaxis()
            bars.spines[:].set_visible(False)
    return figure


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="zeroshot.py", description=__doc__)
    parser.add_argument(
        "data", type=Path, nargs="?", metavar="DATA", help="folder with id2label.json and val/ (default: drawn circles)"
    )
    judged = parser.add_argument_group("CLIP")
    judged.add_argument("--clip", type=Path, default=CLIP, metavar="FOLDER", help="CLIP in transformers' format")
    judged.add_argument(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help=f'{{}} stands for the class (default: "{TEMPLATE}"; for circles "{{}} circle with ... background", with'
        " every colour there is)",
    )
    judged.add_argument(
        "--combine", choices=COMBINATIONS, help="of several templates: their mean, or the best (default for circles)"
    )
    circles = parser.add_argument_group("circles")
    circles.add_argument("--classes", type=int, default=50, help="so many unlike colours")
    circles.add_argument("--count", type=int, default=1000, help="pictures")
    circles.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures")
    files = parser.add_argument_group("figures")
    files.add_argument("--out", type=Path, default=ROOT / "outputs" / "p3_zeroshot", help="folder for the figures")
    add_json_argument(parser)
    judged.add_argument("--precision", choices=PRECISIONS, default="auto", help="of CLIP")
    judged.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Classify, print, write the figures, and return the numbers of `figures_of`.

    Raises:
        UserError: bad arguments, pictures or tables, a folder without CLIP, or one that cannot be written.
    """
    if not 2 <= args.classes <= len(COLOURS) or args.count < 1:
        raise UserError(f"--classes {args.classes} --count {args.count}: from 2 to {len(COLOURS)}, and at least 1")
    if odd := [template for template in args.templates or () if "{}" not in template]:
        raise UserError(f"--templates {odd[0]!r}: has no {{}} for the class, as in {TEMPLATE!r}")
    check_output_folder(args.out)
    check_json(args.json)
    device = pick_device(args.device)
    clip = Clip(args.clip, device, pick_precision(args.precision, device))
    if args.data:
        examples, templates, combine = read_examples(args.data), [TEMPLATE], "mean"
    else:
        examples = circle_examples(distinct_colours(args.classes), args.count, args.seed)
        # A picture of a disc always shows a background as well, and CLIP has hardly seen sentences without one.
        templates, combine = [f"{{}} circle with {name} background" for name in COLOURS], "best"
    templates, combine = args.templates or templates, args.combine or combine
    scores = class_scores(clip, examples, templates, combine)
    result = {"clip": str(args.clip), "templates": templates, "combine": combine}
    result |= figures_of(scores, examples.labels, examples.classes)
    title = (
        f"top-1 {result['top1']:.1%}, top-5 {result['top5']:.1%} of {len(examples)} pictures,"
        f" {len(examples.classes)} classes"
    )
    with staged(args.out) as stage, torch.inference_mode():
        confusion_figure(result["confusion"], examples.classes, title).savefig(stage / "confusion.png", dpi=120)
        scale = clip.model.logit_scale.exp().item()
        examples_figure(examples, scores, scale).savefig(stage / "examples.png", dpi=120)
    write_json(args.json, result)
    print(f"{title}; confusion.png, examples.png in {args.out}")
    return result


if __name__ == "__main__":
    run(main, parse_arguments())

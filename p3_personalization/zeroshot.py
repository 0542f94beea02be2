"""Zero-shot classification: CLIP names what pictures show by comparing them with a sentence for each class.

python zeroshot.py hw2_data/clip_zeroshot --clip FOLDER     # the course's: id2label.json and val/{class}_{n}.png
python zeroshot.py                                          # colours of held-out circles, by the miniature's CLIP

Prints top-1 and top-5 accuracy. OUT gets confusion.png and examples.png: five successes and five failures, each with
the five classes that CLIP finds likeliest.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from common.cli import Parser, UserError, check, format_default, run
from common.files import read_json
from common.images import list_images, plain_text, read_image
from common.output import add_json_argument, check_json, check_output_folder, stage_folder, write_json
from common.runtime import PRECISIONS, pick_device, pick_precision
from latent_diffusion.clip import Clip
from latent_diffusion.miniature import CLIP
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import draw_target, random_scenes

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "A photo of a {}."  # what most of CLIP's zero-shot results were made with
SIZE = 128  # pixels of the circles
PICTURES_AT_ONCE = 256
BEST = 5  # classes shown beside an example, and that top-5 accuracy counts
SHOWN = 5  # successes and failures


@dataclass(frozen=True)
class ZeroShotData:
    """Pictures with one class each."""

    classes: list[str]  # their names
    labels: Tensor  # int64 (N,), each picture's position in `classes`
    read: Callable[[int], np.ndarray]  # from a position to the picture, uint8 (H, W, 3)


def read_folder(folder: Path) -> ZeroShotData:
    """The course's pictures: `id2label.json` and `val/{class}_{n}.png`; a `UserError` where they cannot be used."""
    table, val, mend = folder / "id2label.json", folder / "val", 'write {"0": "bicycle", "1": "chair"}'
    names = read_json(table, mend)
    try:
        names = dict(sorted(names.items(), key=lambda item: int(item[0])))
        if not names or not all(isinstance(name, str) and name.strip() for name in names.values()):
            raise ValueError("a name is missing")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{table}: not a table of classes ({error}); {mend}") from None
    files = list_images(val)
    labels, position = [], {number: k for k, number in enumerate(names)}
    for file in files:
        number, line, _ = file.stem.partition("_")
        if not line or number not in position:
            raise UserError(f"{file}: its class {number} is not in id2label.json; add the class, or move the file away")
        labels.append(position[number])
    return ZeroShotData([*names.values()], torch.tensor(labels), lambda k: read_image(files[k], None))


def distinct_colours(count: int) -> list[str]:
    """Names in COLOURS, each as different as possible from those before it; `snow` and `white` look the same."""
    lab = rgb_to_lab(list(COLOURS.values()))
    differences = ciede2000(lab[:, None], lab)
    chosen = [int(differences.max(axis=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(differences[chosen].min(axis=0).argmax()))
    return [list(COLOURS)[k] for k in chosen]


def make_circles(classes: Sequence[str], count: int, seed: int) -> ZeroShotData:
    """Circles in pairs of colours held out of training; a picture's class is its disc's colour."""
    scenes = random_scenes(sys.maxsize, SIZE, seed, circles=(1,), held_out=True)
    scenes = list(islice((scene for scene in scenes if scene.circles[0].colour in classes), count))
    labels = torch.tensor([classes.index(scene.circles[0].colour) for scene in scenes])
    return ZeroShotData(list(classes), labels, lambda k: draw_target(scenes[k], SIZE))


def class_scores(clip: Clip, data: ZeroShotData, templates: Sequence[str], combine: str) -> Tensor:
    """How well each class fits each picture: cosines, float32 (N, classes) (Radford et al. 2021, section 3.1.4).

    In the templates {} stands for the class. If `combine` is "mean", a picture is compared with the mean of a class's
    sentences, if "best" with the one that fits best.
    """
    sentences = torch.stack(
        [clip.embed_texts([template.replace("{}", name) for name in data.classes]) for template in templates]
    )
    if combine == "mean":
        sentences = F.normalize(sentences.mean(dim=0, keepdim=True), dim=-1)
    rows = []
    for part in torch.arange(len(data.labels)).split(PICTURES_AT_ONCE):
        pictures = clip.embed_images([data.read(k) for k in part.tolist()])
        rows.append((sentences @ pictures.T).amax(dim=0).T)
    return torch.cat(rows)


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 accuracy and the confusion matrix (a row a class, a column a name) of scores (N, classes)."""
    classes = scores.shape[1]
    ranked = scores.topk(min(BEST, classes), dim=1).indices
    right = ranked == labels[:, None]
    confusion = torch.bincount(labels * classes + ranked[:, 0], minlength=classes**2).reshape(classes, classes)
    return {
        "pictures": len(labels),
        "classes": classes,
        "top1": right[:, 0].double().mean().item(),
        "top5": right.any(dim=1).double().mean().item(),
        "confusion": confusion.tolist(),
    }


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Figure:
    """The share of each class's pictures (rows) that got each name (columns)."""
    side = 3 + 0.17 * len(classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot(xlabel="named by CLIP", ylabel="class", title=title)
    shares = F.normalize(torch.tensor(confusion).double(), p=1, dim=1)
    figure.colorbar(axes.imshow(shares.numpy(), vmin=0, vmax=1), ax=axes, shrink=0.6)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    return figure


def choose_examples(wanted: Tensor, labels: Tensor) -> list[int]:
    """The first `SHOWN` wanted pictures (a bool mask), each of another class while there are enough classes."""
    numbers = wanted.nonzero()[:, 0].tolist()
    first = dict(reversed([(int(labels[k]), k) for k in numbers]))
    others = [k for k in numbers if k not in first.values()]
    return sorted([*sorted(first.values()), *others][:SHOWN])


def plot_examples(data: ZeroShotData, scores: Tensor, scale: float) -> Figure:
    """Successes (left) and failures (right), each beside its likeliest classes.

    Bars are the softmax over all classes of the scores times CLIP's own scale, in percent; the true class is green.
    """
    percent = 100 * (scale * scores).softmax(dim=1)
    hits = scores.argmax(dim=1) == data.labels
    figure = Figure(figsize=(11, 2 * SHOWN), layout="constrained")
    grid = figure.subplots(SHOWN, 4, width_ratios=(1, 1.4, 1, 1.4), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for side, (word, wanted) in enumerate({"success": hits, "failure": ~hits}.items()):
        for row, k in enumerate(choose_examples(wanted, data.labels)):
            picture, bars = grid[row, 2 * side : 2 * side + 2]
            picture.imshow(data.read(k))
            # From the left, where a long name has room beside a narrow picture.
            picture.set_title(f"{word}: {data.classes[data.labels[k]]}", fontsize=9, loc="left")
            likeliest = percent[k].topk(min(BEST, len(data.classes)))
            colours = ["tab:green" if right else "tab:gray" for right in likeliest.indices == data.labels[k]]
            drawn = bars.barh(range(len(colours)), likeliest.values.tolist(), color=colours)
            bars.bar_label(drawn, fmt="%.1f %%", fontsize=8, padding=2)
            bars.axis("on")
            bars.set_yticks(range(len(colours)), [data.classes[i] for i in likeliest.indices], fontsize=8)
            bars.set(xlim=(0, 118), xticks=[], frame_on=False)
            bars.invert_yaxis()
    return figure


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="zeroshot.py", description=__doc__)
    data = "folder with id2label.json and val/ (default: drawn circles)"
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA", help=data)
    model = parser.add_argument_group("CLIP")
    model.add_argument("--clip", type=Path, default=CLIP, metavar="FOLDER", help="CLIP in transformers' format")
    templates = (
        f'sentences with {{}} for the class; their mean counts, for circles the best (default: "{TEMPLATE}", for'
    )
    templates += ' circles "{} circle with ... background" with every colour)'
    model.add_argument("--templates", nargs="+", metavar="TEXT", help=templates)
    model.add_argument("--precision", choices=PRECISIONS, default="auto", help="precision of CLIP")
    model.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:1, ...")
    circles = parser.add_argument_group("circles")
    circles.add_argument("--classes", type=int, default=50, help="how many colours, chosen to look different")
    circles.add_argument("--count", type=int, default=1000, help="how many pictures")
    circles.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures")
    files = parser.add_argument_group("figures")
    files.add_argument("--out", type=Path, default=ROOT / "outputs" / "p3_zeroshot", help="folder for the figures")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Classify, print, write the figures, and return the numbers of `accuracies`."""
    check("classes", args.classes, 2 <= args.classes <= len(COLOURS), f"from 2 to {len(COLOURS)}")
    check("count", args.count, args.count >= 1, "at least 1")
    if odd := [template for template in args.templates or () if "{}" not in template]:
        raise UserError(f"--templates {odd[0]!r}: has no {{}} for the class, as in {TEMPLATE!r}")
    check_output_folder(args.out)
    check_json(args.json)
    device = pick_device(args.device)
    clip = Clip(args.clip, device, pick_precision(args.precision, device))
    if args.data:
        data, templates, combine = read_folder(args.data), [TEMPLATE], "mean"
    else:
        data = make_circles(distinct_colours(args.classes), args.count, args.seed)
        # The miniature's CLIP has seen hardly any sentence without a background.
        templates, combine = [f"{{}} circle with {name} background" for name in COLOURS], "best"
    templates = args.templates or templates
    scores = class_scores(clip, data, templates, combine)
    settings = {"clip": format_default(args.clip), "templates": templates, "combine": combine}
    result = settings | accuracies(scores, data.labels)
    title = "top-1 {top1:.1%}, top-5 {top5:.1%} of {pictures} pictures, {classes} classes".format(**result)
    with stage_folder(args.out) as stage, torch.inference_mode(), plain_text():
        plot_confusion(result["confusion"], data.classes, title).savefig(stage / "confusion.png", dpi=120)
        scale = clip.model.logit_scale.exp().item()
        plot_examples(data, scores, scale).savefig(stage / "examples.png", dpi=120)
    write_json(args.json, result)
    print(f"{title}; confusion.png, examples.png in {args.out}")
    return result


if __name__ == "__main__":
    run(main, parse_arguments())

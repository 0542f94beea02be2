"""Judge drawn circles: do they lie where the hints say, and have they the colours that the prompts name?

python evaluate.py JSON SOURCE OUT        # what hw2_3.sh was given, and what it has drawn
python evaluate.py                        # what it draws by default

Figures of each picture, then over all of them:
  iou      area at the centre, hint against picture: intersection over union, the first factor of the course's score
  discs    the same for every disc of the hint
  colours  difference of each disc and of the background from the colour named in the prompt (CIEDE2000): up to 10 it is
           right, which may be a neighbour; its name is right if no other of the named colours is nearer
  score    iou (cos + 1) / 2, where cos compares picture and prompt by CLIP; the course takes the mean of the ten best
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from common.cli import Parser, add_json_argument, check_json, progress, run, write_json
from common.data import read_image
from latent_diffusion.clip import Clip
from latent_diffusion.miniature.colours import COLOURS, ciede2000, colour_named, rgb_to_lab
from latent_diffusion.miniature.regions import (
    centre_iou,
    circle_regions,
    deepest,
    hint_regions,
    intersection_over_union,
    median_colour,
    region_at,
)
from latent_diffusion.miniature.scenes import read_prompt
from latent_diffusion.pairs import Pair, read_pair_image, read_pairs, usable
from p3_controlnet.sample import EXAMPLES, OUTPUT

CLIP = Path(__file__).resolve().parent.parent / "latent_diffusion" / "miniature" / "weights" / "clip"
RIGHT = 10.0  # CIEDE2000: up to here a colour counts as the named one
BEST = 10  # pictures that the course's score is the mean of


@dataclass(frozen=True)
class Area:
    """A disc, or the background, of one picture.

    Attributes:
        iou: of the hint's disc and the area of one colour at its middle; None for the background.
        named: its colour's name in the prompt; None if the prompt does not tell.
        nearest: the name of the colour nearest to its median, among COLOURS.
        difference: CIEDE2000 between its median and the named colour; None if the prompt does not tell.
        name_right: whether the nearest name is the prompt's, or another name of the same colour.
    """

    iou: float | None
    named: str | None
    nearest: str
    difference: float | None
    name_right: bool | None

    @property
    def right(self) -> bool | None:
        """Whether the colour is within CIEDE2000 10 of the named one; None if the prompt does not tell."""
        return None if self.difference is None else self.difference <= RIGHT


@dataclass(frozen=True)
class Judgement:
    """What one picture is worth; `discs` are those of the hint, from left to right."""

    iou: float
    discs: list[Area]
    background: Area

    @property
    def colours_right(self) -> bool | None:
        """Whether all colours are right; None if the prompt does not tell them all."""
        rights = [area.right for area in (*self.discs, self.background)]
        return None if None in rights else all(rights)

    @property
    def names_right(self) -> bool | None:
        """Whether all colours are nearest to the named ones; None if the prompt does not tell them all."""
        rights = [area.name_right for area in (*self.discs, self.background)]
        return None if None in rights else all(rights)


def wanted_colours(prompt: str, discs: int) -> list[str | None]:
    """The names that a prompt gives to so many discs, then to the background; None for each that it does not tell."""
    named, background = read_prompt(prompt) or ([], None)
    if len(named) == 1:
        named = named * discs
    if len(named) != discs:
        named = [None] * discs
    return [name if name and colour_named(name) else None for name in (*named, background)]


def judge_area(image: np.ndarray, region: np.ndarray, named: str | None, iou: float | None = None) -> Area:
    """Compare the colour that an image has in a region with the named one."""
    lab = rgb_to_lab(median_colour(image, region))
    nearest = list(COLOURS)[ciede2000(lab, rgb_to_lab(list(COLOURS.values()))).argmin()]
    if named is None:
        return Area(iou, None, nearest, None, None)
    true = colour_named(named)
    return Area(iou, named, nearest, float(ciede2000(lab, rgb_to_lab(true))), COLOURS[nearest] == true)


def judge(hint: np.ndarray, image: np.ndarray, prompt: str) -> Judgement:
    """Judge one picture by its hint and its prompt; both images are uint8 (H, W, 3) of one size."""
    regions, background = circle_regions(hint_regions(hint))
    *names, background_name = wanted_colours(prompt, len(regions))
    ious = [intersection_over_union(region, region_at(image, deepest(region))) for region in regions]
    discs = [judge_area(image, *disc) for disc in zip(regions, names, ious)]
    return Judgement(centre_iou(hint, image), discs, judge_area(image, background, background_name))


def course_score(iou: Sequence[float], cosines: Sequence[float], best: int | None = BEST) -> float:
    """The course's score: the mean of iou (cos + 1) / 2 over the best pictures, or with None over all."""
    scores = sorted((a * (cos + 1) / 2 for a, cos in zip(iou, cosines)), reverse=True)[:best]
    return sum(scores) / len(scores)


def mean(values: Sequence[float | bool | None]) -> float | None:
    """The mean of what is known, which for truth values is the share of true ones; None if nothing is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summary(judgements: Sequence[Judgement], cosines: Sequence[float] | None = None) -> dict[str, Any]:
    """Figures over all pictures; those that no prompt or hint could give are None."""
    discs = [disc for judgement in judgements for disc in judgement.discs]
    backgrounds = [judgement.background for judgement in judgements]
    figures: dict[str, Any] = {"images": len(judgements), "iou": mean([j.iou for j in judgements])}
    figures["disc_iou"] = mean([disc.iou for disc in discs])
    for name, areas in (("disc", discs), ("background", backgrounds)):
        figures[f"{name}_difference"] = mean([area.difference for area in areas])
        figures[f"{name}_right"] = mean([area.right for area in areas])
        figures[f"{name}_name_right"] = mean([area.name_right for area in areas])
    figures["colours_right"] = mean([j.colours_right for j in judgements])
    figures["names_right"] = mean([j.names_right for j in judgements])
    if cosines is not None:
        iou = [j.iou for j in judgements]
        figures["cosine"] = mean(cosines)
        figures["score_best"] = course_score(iou, cosines)
        figures["score_all"] = course_score(iou, cosines, best=None)
    return figures


def read_drawn(pair: Pair, source: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """The hint and the picture of one line, both uint8 (H, H, 3): a picture of another size is brought to the hint's.

    Raises:
        UserError: one of them is missing or no image; with the table's line.
    """
    hint = read_pair_image(pair, source, size=None)
    side = max(hint.shape[:2])
    hint = read_pair_image(pair, source, side)
    return hint, read_image(out / pair.target, side, f"{pair.where}: ")


def report(names: Sequence[str], judgements: Sequence[Judgement], cosines: Sequence[float] | None) -> None:
    """Print a row a picture."""
    width = max(map(len, names))
    print(f"{'':<{width}}    iou  discs               CIEDE2000: discs, background   cos")
    for i, (name, judgement) in enumerate(zip(names, judgements)):
        ious = " ".join(f"{disc.iou:.3f}" for disc in judgement.discs)
        areas = (*judgement.discs, judgement.background)
        differences = " ".join("    -" if area.difference is None else f"{area.difference:5.1f}" for area in areas)
        cos = "" if cosines is None else f"{cosines[i]:.3f}"
        print(f"{name:<{width}}  {judgement.iou:.3f}  {ious:<18}  {differences:<28}  {cos}".rstrip())


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument(
        "table", type=Path, nargs="?", default=EXAMPLES / "prompt.json", metavar="JSON", help="what was drawn"
    )
    parser.add_argument("source", type=Path, nargs="?", default=EXAMPLES, metavar="SOURCE", help="folder of the hints")
    parser.add_argument("out", type=Path, nargs="?", default=OUTPUT, metavar="OUT", help="folder of the pictures")
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="CLIP model (default: the project's, if it is there)"
    )
    add_json_argument(parser)
    judging.add_argument("--keep-going", action="store_true", help="leave out lines that cannot be judged")
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Judge, print, and return the figures: "summary" over all pictures, and "images", a dictionary each.

    Raises:
        UserError: a bad line, hint or picture, a folder without a CLIP model, or a file that cannot be written.
    """
    check_json(args.json)
    folder = args.clip or (CLIP if CLIP.is_dir() else None)
    clip = Clip(folder) if folder else None
    pairs, pictures, judgements = [], [], []

    def judge_pair(pair: Pair) -> None:
        hint, picture = read_drawn(pair, args.source, args.out)
        judgements.append(judge(hint, picture, pair.prompt))
        pictures.append(picture)
        pairs.append(pair)

    drawn = read_pairs(args.table, args.keep_going)
    usable(judge_pair, progress(drawn, "judging", "picture"), args.keep_going)
    cosines = clip.cosines(pictures, [pair.prompt for pair in pairs]) if clip else None
    report([pair.target for pair in pairs], judgements, cosines)
    figures = summary(judgements, cosines)
    print()
    for name, value in figures.items():
        print(f"{name:<22}" + (f"{value:9.4f}" if isinstance(value, float) else f"{value!s:>9}"))
    images = [
        {"target": pair.target, "prompt": pair.prompt, "colours_right": judgement.colours_right} | asdict(judgement)
        for pair, judgement in zip(pairs, judgements)
    ]
    for image, cosine in zip(images, cosines or []):
        image["cosine"] = cosine
    result = {"summary": figures, "images": images}
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main, parse_arguments())

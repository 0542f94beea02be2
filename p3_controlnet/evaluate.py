"""Judge drawn circles: do they lie where the hints say, and have they the colours that the prompts name?

python evaluate.py JSON SOURCE OUT        # what hw2_3.sh was given, and what it has drawn
python evaluate.py                        # what it draws by default

Figures of each picture, then over all of them:
  iou      area at the centre, hint against picture: intersection over union, the first factor of the course's score
  discs    the same for every disc of the hint
  colours  CIEDE2000 from the colour that the prompt names to that of each disc and of the background: right up to 10
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
from latent_diffusion import miniature
from latent_diffusion.clip import Clip
from latent_diffusion.miniature.colours import COLOURS, ciede2000, colour_named, rgb_to_lab
from latent_diffusion.miniature.regions import (
    NEAR,
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
from p3_controlnet.sample import add_places

BEST = 10  # pictures that the course's score is the mean of


@dataclass(frozen=True)
class Area:
    """A disc, or the background, of one picture.

    Attributes:
        iou: of the hint's disc and the area of one colour at its middle; None for the background.
        named: its colour's name in the prompt; None if the prompt does not tell.
        nearest: the name of the colour nearest to its median, among COLOURS.
        difference: CIEDE2000 between its median and the named colour; None if the prompt does not tell.
    """

    iou: float | None
    named: str | None
    nearest: str
    difference: float | None

    @property
    def right(self) -> bool | None:
        """Whether the colour is near the named one; None if the prompt does not tell."""
        return None if self.difference is None else self.difference <= NEAR


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
    return Area(iou, named, nearest, named and float(ciede2000(lab, rgb_to_lab(colour_named(named)))))


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


def summarise(judgements: Sequence[Judgement], cosines: Sequence[float] | None = None) -> dict[str, Any]:
    """Figures over all pictures; those that no prompt or hint could give are None."""
    discs = [disc for judgement in judgements for disc in judgement.discs]
    backgrounds, iou = [judgement.background for judgement in judgements], [judgement.iou for judgement in judgements]
    figures: dict[str, Any] = {"images": len(judgements), "iou": mean(iou), "disc_iou": mean([d.iou for d in discs])}
    for name, areas in (("disc", discs), ("background", backgrounds)):
        figures[f"{name}_difference"] = mean([area.difference for area in areas])
        figures[f"{name}_right"] = mean([area.right for area in areas])
    figures["colours_right"] = mean([judgement.colours_right for judgement in judgements])
    if cosines is not None:
        figures["cosine"] = mean(cosines)
        figures["score_best"], figures["score_all"] = (course_score(iou, cosines, best) for best in (BEST, None))
    return figures


def print_rows(pairs: Sequence[Pair], judgements: Sequence[Judgement], cosines: Sequence[float] | None) -> None:
    """Print a row a picture."""
    width = max(len(pair.target) for pair in pairs)
    print(f"{'':<{width}}    iou  discs               CIEDE2000: discs, background   cos")
    for i, (pair, judgement) in enumerate(zip(pairs, judgements)):
        ious = " ".join(f"{disc.iou:.3f}" for disc in judgement.discs)
        areas = (*judgement.discs, judgement.background)
        differences = " ".join("    -" if area.difference is None else f"{area.difference:5.1f}" for area in areas)
        cos = "" if cosines is None else f"{cosines[i]:.3f}"
        print(f"{pair.target:<{width}}  {judgement.iou:.3f}  {ious:<18}  {differences:<28}  {cos}".rstrip())


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    add_places(parser, "folder of the pictures")
    parser.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="CLIP model (default: the project's, if it is there)"
    )
    parser.add_argument("--keep-going", action="store_true", help="skip lines that cannot be judged")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Judge, print, and return the figures: "summary" over all pictures, and "images", a dictionary each.

    Raises:
        UserError: a bad line, hint or picture, a folder without a CLIP model, or a file that cannot be written.
    """
    check_json(args.json)
    folder = args.clip or (miniature.CLIP if miniature.CLIP.is_dir() else None)
    clip = Clip(folder) if folder else None

    def judge_pair(pair: Pair) -> tuple[Pair, np.ndarray, Judgement]:
        height, width, _ = read_pair_image(pair, args.source, size=None).shape
        side = max(height, width)
        hint, picture = (
            read_pair_image(pair, args.source, side),
            read_image(args.out / pair.target, side, f"{pair.where}: "),
        )
        return pair, picture, judge(hint, picture, pair.prompt)

    drawn = read_pairs(args.table, args.keep_going)
    pairs, pictures, judgements = zip(*usable(judge_pair, progress(drawn, "judging", "picture"), args.keep_going))
    cosines = clip.cosines(pictures, [pair.prompt for pair in pairs]) if clip else None
    print_rows(pairs, judgements, cosines)
    summary = summarise(judgements, cosines)
    print()
    for name, value in summary.items():
        print(f"{name:<22}" + (f"{value:9.4f}" if isinstance(value, float) else f"{value!s:>9}"))
    images = [
        {"target": pair.target, "prompt": pair.prompt, "colours_right": judgement.colours_right} | asdict(judgement)
        for pair, judgement in zip(pairs, judgements)
    ]
    for image, cosine in zip(images, cosines or []):
        image["cosine"] = cosine
    result = {"summary": summary, "images": images}
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main, parse_arguments())

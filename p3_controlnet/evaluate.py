"""Judge drawn circles: are they where the hints say, in the colours that the prompts name?

python evaluate.py JSON SOURCE OUT        # what hw2_3.sh was given, and what it has drawn
python evaluate.py                        # what it draws by default

Measures, of each picture and over all:
  iou            of the areas at the centre of hint and picture: the first factor of the course's score
  disc_iou       the same for every disc of the hint, of which only the part within the picture counts
  difference     CIEDE2000 from a named colour to that of its disc or background; up to 10 it is right
  colours_right  whether the colours of all discs and of the background are right
  cosine         of picture and prompt, by CLIP
  score          iou (cosine + 1) / 2, of which the course takes the mean of the ten best

All but the pictures' own figures are also given for those apart whose hints have a disc that the border cuts.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np
import pandas as pd

from common.cli import Parser, progress, run
from common.images import read_image
from common.output import add_json_argument, check_json, write_json
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
    is_cut,
    median_colour,
    region_at,
)
from latent_diffusion.miniature.scenes import read_prompt
from latent_diffusion.pairs import Pair, read_pair_image, read_pairs, usable
from p3_controlnet.sample import add_places

JUDGED = 256  # pixels: the side that larger hints of smaller pictures are reduced to
BEST = 10  # pictures that the course's score is the mean of


def wanted_colours(prompt: str, discs: int) -> list[str | None]:
    """The names that a prompt gives to so many discs, then to the background; None for each that it does not tell."""
    named, background = read_prompt(prompt) or ([], None)
    if len(named) == 1:
        named = named * discs
    if len(named) != discs:
        named = [None] * discs
    return [name if name and colour_named(name) else None for name in (*named, background)]


def judge_area(image: np.ndarray, region: np.ndarray, named: str | None, iou: float | None = None) -> dict[str, Any]:
    """Compare the colour that an image has in a region with the named one; what the prompt does not tell is None."""
    lab = rgb_to_lab(median_colour(image, region))
    nearest = list(COLOURS)[ciede2000(lab, rgb_to_lab(list(COLOURS.values()))).argmin()]
    difference = named and float(ciede2000(lab, rgb_to_lab(colour_named(named))))
    right = named and difference <= NEAR
    return {"iou": iou, "named": named, "nearest": nearest, "difference": difference, "right": right}


def judge(hint: np.ndarray, image: np.ndarray, prompt: str) -> dict[str, Any]:
    """Judge one picture by its hint and its prompt; both images are uint8 (H, W, 3) of one size.

    Discs are those of the hint, from left to right; whether all colours are right is None if the prompt does not tell.
    """
    regions, background = circle_regions(hint_regions(hint))
    names = wanted_colours(prompt, len(regions))
    ious = [intersection_over_union(region, region_at(image, deepest(region))) for region in regions]
    areas = [judge_area(image, *area) for area in zip([*regions, background], names, [*ious, None])]
    rights = [area["right"] for area in areas]
    known = {"iou": centre_iou(hint, image), "colours_right": None if None in rights else all(rights)}
    known["cut"] = any(is_cut(region) for region in regions)
    return known | {"discs": areas[:-1], "background": areas[-1]}


def course_score(iou: Sequence[float], cosines: Sequence[float], best: int | None = BEST) -> float:
    """The course's score: the mean of iou (cos + 1) / 2 over the best pictures, or with None over all."""
    scores = sorted((a * (cos + 1) / 2 for a, cos in zip(iou, cosines)), reverse=True)[:best]
    return sum(scores) / len(scores)


def mean(values: Sequence[float | bool | None]) -> float | None:
    """The mean of what is known, which for truth values is the share of true ones; None if nothing is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summarise(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over all pictures; those that no prompt or hint could give are None."""
    discs = [disc for image in images for disc in image["discs"]]
    backgrounds, iou = [image["background"] for image in images], [image["iou"] for image in images]
    figures = {"images": len(images), "iou": mean(iou), "disc_iou": mean([disc["iou"] for disc in discs])}
    for name, areas in (("disc", discs), ("background", backgrounds)):
        for what in ("difference", "right"):
            figures[f"{name}_{what}"] = mean([area[what] for area in areas])
    figures["colours_right"] = mean([image["colours_right"] for image in images])
    if "cosine" in images[0]:
        cosines = [image["cosine"] for image in images]
        figures |= {"cosine": mean(cosines), "score_best": course_score(iou, cosines)}
        figures["score_all"] = course_score(iou, cosines, best=None)
    return figures


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    add_places(parser, "folder of the pictures")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--clip", type=Path, metavar="FOLDER", help="CLIP model (default: the project's own)")
    judging.add_argument("--keep-going", action="store_true", help="skip lines that cannot be judged")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Judge, print, and return the figures: "summary" over all pictures, "cut" and "whole", and "images", one each."""
    check_json(args.json)
    folder = args.clip or (miniature.CLIP if miniature.CLIP.is_dir() else None)
    clip, pictures = Clip(folder) if folder else None, []

    def judge_pair(pair: Pair) -> dict[str, Any]:
        hint, where = read_pair_image(pair, args.source, size=None), f"{pair.where}: "
        drawn = read_image(args.out / pair.target, None, where)
        side = min(max(hint.shape), max(JUDGED, *drawn.shape))
        picture = read_image(args.out / pair.target, side, where)
        judgement = judge(read_pair_image(pair, args.source, side), picture, pair.prompt)
        pictures.append(picture)
        return {"target": pair.target, "prompt": pair.prompt} | judgement

    pairs = read_pairs(args.table, args.keep_going)
    images = usable(judge_pair, progress(pairs, "judging", "picture"), args.keep_going)
    if clip:
        for image, cosine in zip(images, clip.cosines(pictures, [image["prompt"] for image in images])):
            image["cosine"] = cosine
    groups = {"summary": images}
    for name, cut in (("whole", False), ("cut", True)):
        groups[name] = [image for image in images if image["cut"] == cut]
    figures = {name: summarise(group) for name, group in groups.items() if group}
    print(pd.DataFrame(images).drop(columns=["discs", "background"]).to_string(index=False, float_format="%.3f"))
    print(pd.DataFrame(figures).rename(columns={"summary": "all"}).to_string(float_format="%.4f"))
    write_json(args.json, result := figures | {"images": images})
    return result


if __name__ == "__main__":
    run(main, parse_arguments())

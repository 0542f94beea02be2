"""Judge pictures of hints of every kind: lines thin and thick, broken or noisy, and what else a file may hold.

python robustness.py --json docs/results/p3_hints.json        # the shipped ControlNet, with its default options

Each kind has the same scenes, of colour pairs that training never showed, as files of 512 pixels. Pictures are judged
by the scenes' exact outlines; iou and colours_right are those of evaluate.py.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np
import pandas as pd
import torch
from PIL import Image

from common.cli import Parser, check, progress, run
from common.output import add_json_argument, check_json, write_json
from common.runtime import seeded_generator
from latent_diffusion.miniature import BASE
from latent_diffusion.miniature.scenes import DRAWN, FLAWS, Scene, distances, draw_hint, random_scenes
from latent_diffusion.pairs import Pair
from p3_controlnet.evaluate import JUDGED, judge, summarise
from p3_controlnet.sample import add_sampling_arguments, load_sampler

LINE_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12)  # pixels of 512
KINDS = (*(f"{width}px" for width in LINE_WIDTHS), *FLAWS, "squeezed", "inverted", "filled")


def squeezed(hint: np.ndarray) -> np.ndarray:
    """What a file of 4:3 is read as: its circles become ellipses."""
    low = DRAWN // 8
    return np.asarray(Image.fromarray(hint[low:-low]).resize((DRAWN, DRAWN), Image.Resampling.LANCZOS))


def make_hint(scene: Scene, k: int, kind: str) -> np.ndarray:
    """A hint of one of KINDS of scene k, as the file holds it: uint8 (512, 512, 3)."""
    if kind == "filled":  # white discs in place of their outlines
        discs = np.logical_or.reduce([distances(circle, DRAWN) < circle.radius for circle in scene.circles])
        return np.repeat(np.uint8(255 * discs)[..., None], 3, axis=2)
    if kind.endswith("px"):
        scene = replace(scene, line_width=int(kind[:-2]) / DRAWN)
    hint = draw_hint(scene, DRAWN, kind if kind in FLAWS else None, seeded_generator(0, 9, k))
    if kind == "squeezed":
        return squeezed(hint)
    return 255 - hint if kind == "inverted" else hint  # black lines on white


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="robustness.py", description=__doc__)
    judging = parser.add_argument_group("judging")
    judging.add_argument("--count", type=int, default=24, help="scenes of one circle, and as many of two")
    judging.add_argument("--scenes-seed", type=int, default=3, help="seed of the scenes")
    judging.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="which kinds")
    judging.add_argument("--base", type=Path, default=BASE, help="the frozen model: one file or a diffusers folder")
    add_sampling_arguments(parser)
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict:
    """Draw, judge, print, and return the figures of each kind by number of circles, "one" and "two"."""
    check_json(args.json)
    check("count", args.count, args.count >= 1, "at least 1")
    sampler, options = load_sampler(args)
    size, figures = sampler.sides(options)[0], {}
    for kind in progress(args.kinds, "hints", "kind"):
        figures[kind] = {"count": args.count}
        for name, circles in (("one", 1), ("two", 2)):
            scenes = list(random_scenes(args.count, DRAWN, args.scenes_seed, (circles,), True))
            hints = [Image.fromarray(make_hint(scene, k, kind)) for k, scene in enumerate(scenes)]
            small = [np.array(hint.resize((size, size), Image.Resampling.LANCZOS)) for hint in hints]
            pairs = [Pair("", f"{k}.png", scene.prompt, f"scene {k}") for k, scene in enumerate(scenes)]
            items = [(pair, torch.from_numpy(hint).permute(2, 0, 1)) for pair, hint in zip(pairs, small)]
            judged = []
            for k, (_, picture) in enumerate(sampler.images(items, options)):
                exact = make_hint(scenes[k], k, "8px")
                images = squeezed(exact) if kind == "squeezed" else exact, picture.permute(1, 2, 0).numpy()
                resized = [
                    Image.fromarray(image).resize((JUDGED, JUDGED), Image.Resampling.LANCZOS) for image in images
                ]
                judged.append(judge(*map(np.asarray, resized), scenes[k].prompt))
            summary = summarise(judged)
            figures[kind][name] = {key: summary[key] for key in ("iou", "disc_iou", "colours_right")}
    print(pd.json_normalize(list(figures.values())).set_axis(list(figures)).to_string(float_format="%.3f"))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())

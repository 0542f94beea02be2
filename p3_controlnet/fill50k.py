"""Make circles to train and test on, in the layout of the course's fill50k.

python fill50k.py runs/fill50k --count 20000                       # one circle or two
python fill50k.py runs/test --count 200 --circles 1 --held-out     # colour pairs that training never shows
python fill50k.py examples --count 20 --circles 1 --held-out --seed 2025 --size 512 --report    # the shipped examples

OUT gets prompt.json (a line an image), source/ (outlines, white on black) and target/ (discs on a background).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

from PIL import Image

from common.cli import Parser, check, progress, run, say
from common.output import stage_folder
from common.runtime import seeded_generator
from latent_diffusion.miniature.scenes import (
    DRAWN,
    FLAWS,
    Circle,
    Scene,
    draw_hint,
    draw_target,
    random_scenes,
    roughen,
)

SMALLEST = 32  # pixels
CIRCLES = {"1": (1,), "2": (2,), "both": (1, 2)}
# The report's two circles: left, right, background. The course's sentence names one colour for both.
REPORT = {"two_gray": ("gray", "gray", "medium blue"), "two_colours": ("gold", "crimson", "dark slate gray")}
REPORT_HINT = "source/two.png"


def report_scene(size: int, left: str, right: str, background: str) -> Scene:
    """The report's two circles, in these colours."""
    unit = size / 128
    circles = Circle(40 * unit, 52 * unit, 24 * unit, left), Circle(92 * unit, 80 * unit, 20 * unit, right)
    return Scene(circles, background)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="fill50k.py", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    circles = parser.add_argument_group("circles")
    circles.add_argument("--count", type=int, default=20_000, help="how many images")
    circles.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    circles.add_argument("--seed", type=int, default=0, help="image k depends on the seed and k alone")
    circles.add_argument(
        "--circles", choices=CIRCLES, default="both", help="circles an image; both: one and two in turns"
    )
    circles.add_argument("--held-out", action="store_true", help="use only the colour pairs kept for testing")
    circles.add_argument("--report", action="store_true", help="add the report's hint of two circles, with two prompts")
    lines = parser.add_argument_group("lines of the hints (default: of 2 to 8 pixels, where the side has 512)")
    lines.add_argument("--line-width", type=float, metavar="PIXELS", help="one width for all, where the side has 512")
    lines.add_argument(
        "--rough",
        nargs="?",
        const="any",
        choices=("any", *FLAWS),
        help="flaws to train or to test on: gaps in the lines, noise of JPEG files, or in turns those and odd widths",
    )
    return parser.parse_args(argv)


def main(args) -> Path:
    """Write the images and their table; returns the table's path."""
    check("count", args.count, args.count >= 1, "at least 1")
    check("size", args.size, args.size >= SMALLEST, f"at least {SMALLEST}")
    check("line_width", args.line_width, args.line_width is None or args.line_width > 0, "above 0")
    scenes = random_scenes(args.count, args.size, args.seed, CIRCLES[args.circles], args.held_out)
    named = [(f"source/{k}.png", f"target/{k}.png", scene) for k, scene in enumerate(scenes)]
    if args.report:
        named += [(REPORT_HINT, f"target/{name}.png", report_scene(args.size, *REPORT[name])) for name in REPORT]
    with stage_folder(args.out) as stage, open(stage / "prompt.json", "w") as table:
        (stage / "source").mkdir()
        (stage / "target").mkdir()
        for k, (source, target, scene) in enumerate(progress(named, "circles", "image")):
            generator, flaw = seeded_generator(args.seed, 9, k), args.rough
            if args.line_width:
                scene = replace(scene, line_width=args.line_width / DRAWN)
            if flaw == "any":
                scene, flaw = roughen(scene, generator)
            pictures = draw_hint(scene, args.size, flaw, generator), draw_target(scene, args.size)
            for name, picture in zip((source, target), pictures):
                # Flat areas shrink well at any level; the first one is the quickest.
                Image.fromarray(picture).save(stage / name, compress_level=1)
            table.write(json.dumps({"source": source, "target": target, "prompt": scene.prompt}) + "\n")
    say(f"{args.count} images in {args.out}")
    return args.out / "prompt.json"


if __name__ == "__main__":
    run(main, parse_arguments())

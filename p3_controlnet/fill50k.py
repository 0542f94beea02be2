"""Make circles to train and test on, in the layout of the course's fill50k.

python fill50k.py runs/fill50k --count 20000                       # one circle or two
python fill50k.py runs/test --count 200 --circles 1 --held-out     # colour pairs that training never shows

OUT gets prompt.json (a line an image), source/ (outlines, white on black) and target/ (discs on a background).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from common.cli import Parser, Progress, UserError, run, say
from common.images import staged
from latent_diffusion.miniature.scenes import draw_hint, draw_target, random_scenes

SMALLEST = 32  # pixels
CIRCLES = {"1": (1,), "2": (2,), "both": (1, 2)}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="fill50k.py", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    circles = parser.add_argument_group("circles")
    circles.add_argument("--count", type=int, default=20_000, help="images")
    circles.add_argument("--size", type=int, default=128, help="side in pixels")
    circles.add_argument("--seed", type=int, default=0, help="image k depends on it and k alone")
    circles.add_argument("--circles", choices=CIRCLES, default="both", help="in an image; both: in turns")
    circles.add_argument("--held-out", action="store_true", help="only the colour pairs kept for testing")
    return parser.parse_args(argv)


def main(args) -> Path:
    """Write the images and their table; returns the table's path."""
    if args.count < 1 or args.size < SMALLEST:
        raise UserError(f"--count {args.count} --size {args.size}: they start at 1 and {SMALLEST}")
    scenes = random_scenes(args.count, args.size, args.seed, CIRCLES[args.circles], args.held_out)
    with staged(args.out) as stage, Progress(args.count, "circles", "image") as phase:
        folders = {"source": draw_hint, "target": draw_target}
        for folder in folders:
            (stage / folder).mkdir()
        with open(stage / "prompt.json", "w") as table:
            for k, scene in enumerate(scenes):
                names = {folder: f"{folder}/{k}.png" for folder in folders}
                for folder, draw in folders.items():
                    # Flat areas shrink well at any level; the first one is the quickest.
                    Image.fromarray(draw(scene, args.size)).save(stage / names[folder], compress_level=1)
                table.write(json.dumps(names | {"prompt": scene.prompt}) + "\n")
                phase.update()
    say(f"{args.count} images in {args.out}")
    return args.out / "prompt.json"


if __name__ == "__main__":
    run(main, parse_arguments())

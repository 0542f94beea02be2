"""Make the examples that come with the project: single circles of held-out colour pairs, and one hint of two circles.

python make_examples.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from common.cli import Parser, run
from common.images import staged
from latent_diffusion.miniature.scenes import Circle, Scene, draw_hint, draw_target, random_scenes

HERE = Path(__file__).resolve().parent
SINGLES = 20
TWO = "source/two.png"
# One colour for both circles, as the course's sentence has it, and one for each.
TWO_COLOURS = {"two_gray": ("gray", "gray", "medium blue"), "two_colours": ("gold", "crimson", "dark slate gray")}


def two_circles(size: int, left: str, right: str, background: str) -> Scene:
    """The report's two circles, in these colours."""
    unit = size / 128
    circles = Circle(40 * unit, 52 * unit, 24 * unit, left), Circle(92 * unit, 80 * unit, 20 * unit, right)
    return Scene(circles, background)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="make_examples.py", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "examples", metavar="OUT", help="folder")
    circles = parser.add_argument_group("circles")
    circles.add_argument("--size", type=int, default=128, help="side in pixels")
    circles.add_argument("--seed", type=int, default=2025, help="of the single circles")
    return parser.parse_args(argv)


def main(args) -> Path:
    """Write OUT/prompt.json, OUT/source and OUT/target; returns the table."""
    scenes = {str(k): scene for k, scene in enumerate(random_scenes(SINGLES, args.size, args.seed, (1,), True))}
    scenes |= {name: two_circles(args.size, *colours) for name, colours in TWO_COLOURS.items()}
    with staged(args.out) as stage:
        for folder in ("source", "target"):
            (stage / folder).mkdir()
        lines = []
        for name, scene in scenes.items():
            source = f"source/{name}.png" if len(scene.circles) == 1 else TWO
            target = f"target/{name}.png"
            Image.fromarray(draw_hint(scene, args.size)).save(stage / source)
            Image.fromarray(draw_target(scene, args.size)).save(stage / target)
            lines.append({"source": source, "target": target, "prompt": scene.prompt})
        (stage / "prompt.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return args.out / "prompt.json"


if __name__ == "__main__":
    run(main, parse_arguments())

"""Compare drawn faces with the ground truth: the mean squared error of each image on the 0-255 scale, and the mean.

python evaluate.py OUT GT
python evaluate.py        # what hw2_2.sh draws by default, and the ground truth that comes with the project
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np

from common.cli import Parser, UserError, run
from common.images import list_images, read_image
from common.output import add_json_argument, check_json, write_json
from p2_ddim.sample import EXAMPLES, OUTPUT


def images_in(folder: Path) -> dict[str, Path]:
    """The images of a folder by name without suffix; a `UserError` if there are none, or two of one name."""
    files = list_images(folder)
    by_name = {path.stem: path for path in files}
    if twice := [path for path in files if by_name[path.stem] != path]:
        raise UserError(f"{twice[0]}: {by_name[twice[0].stem].name} has that name too; remove one of them")
    return by_name


def squared_errors(out: Path, truth: Path) -> dict[str, float]:
    """Mean squared error of every image, over pixels and colours, on the 0-255 scale; by file name.

    A `UserError` if a folder or an image is missing, one folder has an image more, or two images differ in size.
    """
    drawn, true = images_in(out), images_in(truth)
    if lone := sorted(drawn.keys() ^ true.keys()):
        folder, other = (out, truth) if lone[0] in true else (truth, out)
        raise UserError(f"{folder}: has no {lone[0]}, which {other} has ({len(lone)} differ); compare matching folders")
    errors = {}
    for name in true:
        a, b = (read_image(files[name], size=None).astype(np.float64) for files in (drawn, true))
        if a.shape != b.shape:
            sizes = f"{a.shape[1]}x{a.shape[0]}, but {true[name]} is {b.shape[1]}x{b.shape[0]}"
            raise UserError(f"{drawn[name]}: is {sizes}; draw it from a noise of that size")
        errors[drawn[name].name] = float(np.square(a - b).mean())
    return errors


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    truth = EXAMPLES / "GT"
    parser.add_argument("out", type=Path, nargs="?", default=OUTPUT, metavar="OUT", help="folder of drawn images")
    parser.add_argument("truth", type=Path, nargs="?", default=truth, metavar="GT", help="folder of the ground truth")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict[str, float]:
    """Print and return the error of every image, and under "mean" their mean."""
    check_json(args.json)
    errors = squared_errors(args.out, args.truth)
    errors["mean"] = sum(errors.values()) / len(errors)
    for name, error in errors.items():
        print(f"{name:<12} {error:9.4f}")
    write_json(args.json, errors)
    return errors


if __name__ == "__main__":
    run(main, parse_arguments())

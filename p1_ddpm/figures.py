"""Draw the report's figures: digits beside real ones, the reverse process step by step, guidance in a row.

python figures.py --out DIR
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor

from common.cli import Parser, options_from, run, say
from common.images import add_captions, grid, save_gif, save_png, to_uint8
from common.output import stage_folder
from common.sampling import Step
from p1_ddpm.digits import DOMAINS, ROOT, Digit, read_real, wanted_digits
from p1_ddpm.sample import DigitOptions, DigitSampler, add_sampling_arguments, load_digit_sampler

COLUMNS = 10  # noises of a digit
ROWS_2025 = [("svhn" if label % 2 else "mnistm", label) for label in range(10)]
SCALES = (1.0, 2.0, 4.0, 6.0, 8.0)  # 6 draws the graded digits
FIRST = (Digit("mnistm", 0, 1), Digit("svhn", 1, 1))
# Many small steps show the way from noise to image. They lead to much the same image as the few of the graded ones.
PROCESS = {"sampler": "ddim", "steps": 50, "eta": 0.0}
SNAPSHOTS = 6


def draw_grids(
    sampler: DigitSampler, options: DigitOptions, real: Mapping[tuple[str, int], Tensor]
) -> dict[str, Tensor]:
    """The 10x10 grid of the 2025 layout, and one for each domain for 2024, by file name.

    A row shows a digit, a column a noise; where `real` has an image of every row's (domain, digit), it stands at the
    row's end.
    """
    drawn = dict(sampler.images(wanted_digits(DOMAINS, "2024", None, COLUMNS), options))
    layouts = {"grid_2025.png": ROWS_2025}
    layouts |= {f"grid_2024_{domain}.png": [(domain, label) for label in range(10)] for domain in DOMAINS}
    title = f"A row a digit, a column a noise; guidance scale {options.guidance_scale:g}"
    pictures = {}
    for name, rows in layouts.items():
        numbers = range(1, COLUMNS + 1)
        images = [drawn[Digit(*row, number)] for row in rows for number in numbers]
        picture, heads = grid(torch.stack(images), COLUMNS, scale=3), [str(number) for number in numbers]
        if all(row in real for row in rows):
            column = grid(torch.stack([real[row] for row in rows]), 1, scale=3)
            picture, heads = torch.cat([picture, column], dim=2), [*heads, "real"]
        pictures[name] = add_captions(picture, [f"{domain} {label}" for domain, label in rows], heads, title)
    return pictures


def draw_guidance(sampler: DigitSampler, options: DigitOptions) -> Tensor:
    """The ten digits of the 2025 layout from the same noise, with more guidance in each row."""
    digits = [Digit(*row, 1) for row in ROWS_2025]
    drawn = [sampler.images(digits, replace(options, guidance_scale=scale)) for scale in SCALES]
    return add_captions(
        grid(torch.stack([image for row in drawn for _, image in row]), len(digits), scale=3),
        [f"scale {scale:g}" for scale in SCALES],
        [str(digit.label) for digit in digits],
        "A column a digit, always from the same noise; a row a guidance scale (1 = none)",
    )


def find_moments(noise: Tensor, steps: Sequence[Step]) -> list[tuple[str, Tensor, Tensor]]:
    """A walk from its noise to its images: the time of each moment, xt, and the x0 predicted from it."""
    times = [*(f"t = {step.t}" for step in steps), "image"]
    xt = [noise, *(step.xt for step in steps)]
    # A step's x0 was predicted from the xt before it; from the finished image nothing is predicted any more.
    x0 = [*(step.x0 for step in steps), steps[-1].xt]
    return list(zip(times, xt, x0))


def draw_snapshots(moments: Sequence[tuple[str, Tensor, Tensor]]) -> Tensor:
    """Six moments, first and last included: for each digit xt, and beneath it the x0 predicted from it."""
    chosen = torch.linspace(0, len(moments) - 1, SNAPSHOTS).round().long().tolist()
    times, xt, x0 = zip(*(moments[i] for i in chosen))
    images = [image[digit] for digit in range(len(FIRST)) for image in (*xt, *x0)]
    return add_captions(
        grid(to_uint8(torch.stack(images)), SNAPSHOTS, scale=4),
        [caption for digit in FIRST for caption in (f'first "{digit.label}": xt', "predicted x0")],
        times,
        f"The reverse process ({PROCESS['sampler'].upper()}, {PROCESS['steps']} steps)",
    )


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=ROOT / "outputs" / "p1_figures", help="folder that gets the figures")
    files.add_argument("--data", type=Path, help="the course's digits folder, if not hw2_data/digits")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw all figures; returns their files."""
    options = options_from(args, DigitOptions)
    sampler = load_digit_sampler(args.weights, options)
    with stage_folder(args.out) as stage:
        real = {
            (domain, label): image
            for domain, (_, held_out) in read_real(args.data, sampler.about["image_size"]).items()
            for label, image in zip(held_out.labels.tolist(), held_out.images)
        }
        pictures = draw_grids(sampler, options, real)
        slowly = replace(options, **PROCESS)
        moments = find_moments(sampler.noise(FIRST, slowly), list(sampler.walk(FIRST, slowly)))
        pictures["reverse_process.png"] = draw_snapshots(moments)
        pictures["guidance.png"] = draw_guidance(sampler, options)
        for name, picture in pictures.items():
            save_png(stage / name, picture)
        frames = [add_captions(grid(to_uint8(xt), len(FIRST), scale=5, gap=4), title=time) for time, xt, _ in moments]
        save_gif(stage / "reverse_process.gif", frames, milliseconds=80)
    names = [*pictures, "reverse_process.gif"]
    say(f"{len(names)} figures in {args.out}: {', '.join(names)}")
    return [args.out / name for name in names]


if __name__ == "__main__":
    run(main, parse_arguments())

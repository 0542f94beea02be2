"""Draw the report's figures: digits beside real ones, the reverse process step by step, guidance in a row.

python figures.py --out DIR
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from common.cli import Parser, Progress, UserError, run, say
from common.data import LabelledImages
from common.images import captioned, grid, save_gif, save_png, staged, to_uint8
from common.sampling import Step, reverse_process
from p1_ddpm.digits import DOMAINS, LAYOUTS, read_digits
from p1_ddpm.sample import Digit, DigitSampler, add_sampling_arguments, make_sampler, sampling_options

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "hw2_data" / "digits"
COLUMNS = 10  # noises of a digit
SCALES = (1.0, 2.0, 3.0, 4.0, 5.0)
# The first "0" and the first "1" that the 2025 layout draws.
FIRST = (Digit("mnistm", 0, 1), Digit("svhn", 1, 1))
# The way from noise to image is shown in many small steps. From the same noise they lead to much the same image as the
# few steps that the graded images take.
PROCESS = {"sampler": "ddim", "steps": 50, "eta": 0.0}
SNAPSHOTS = 6


def layout_rows(layout: str, domain: str | None = None) -> list[tuple[str, int]]:
    """(domain, digit) of every row of a layout's grid, by digit."""
    rows = [(name, digit) for name, digits in LAYOUTS[layout].items() for digit in digits if domain in (None, name)]
    return sorted(rows, key=lambda row: row[1])


def digit_grid(
    drawn: dict[Digit, Tensor], rows: Sequence[tuple[str, int]], real: dict[str, LabelledImages], title: str
) -> Tensor:
    """A grid with a row a digit and a column a noise, and a column of real images where there are any.

    Args:
        drawn: uint8 (3, H, W) images by digit.
        rows: (domain, digit) of each row.
        real: real images by domain, of the same size.
        title: what stands above.
    """
    images = [drawn[Digit(*row, number)] for row in rows for number in range(1, COLUMNS + 1)]
    picture = grid(torch.stack(images), COLUMNS, scale=3)
    heads = [str(number) for number in range(1, COLUMNS + 1)]
    if all(domain in real for domain, _ in rows):
        white = torch.full_like(images[0], 255)
        column = []
        for domain, label in rows:
            examples = real[domain].images[real[domain].labels == label]
            column.append(examples[0] if len(examples) else white)
        picture = torch.cat([picture, grid(torch.stack(column), 1, scale=3)], dim=2)
        heads.append("real")
    return captioned(picture, [f"{domain} {label}" for domain, label in rows], heads, title)


def grids(
    sampler: DigitSampler, seed: int, options: dict[str, Any], real: dict[str, LabelledImages]
) -> dict[str, Tensor]:
    """The 10x10 grid of the 2025 layout, and one for each domain for 2024, by file name."""
    drawn = {}
    for domain, label in layout_rows("2024"):
        digits = [Digit(domain, label, number) for number in range(1, COLUMNS + 1)]
        drawn |= zip(digits, sampler.images(digits, seed, options))
    title = f"A row a digit, a column a noise; guidance scale {options['guidance_scale']:g}"
    rows = {"grid_2025.png": layout_rows("2025")}
    rows |= {f"grid_2024_{domain}.png": layout_rows("2024", domain) for domain in DOMAINS}
    return {name: digit_grid(drawn, rows[name], real, title) for name in rows}


def reverse_walk(sampler: DigitSampler, seed: int, options: dict[str, Any]) -> tuple[Tensor, list[Step]]:
    """The starting noise of the first 0 and the first 1, and every step from it to the images."""
    arguments = sampler.steps(FIRST, seed, options | PROCESS)
    return arguments["xt"], list(reverse_process(**arguments))


def snapshots(noise: Tensor, steps: Sequence[Step]) -> Tensor:
    """Six moments of the walk, first and last included: for each digit xt, and beneath it the x0 predicted from it."""
    xt = [noise, *(step.xt for step in steps)]
    # A step's x0 was predicted from the xt before it; from the finished image nothing is predicted any more.
    x0 = [*(step.x0 for step in steps), steps[-1].xt]
    times = [*(f"t = {step.t}" for step in steps), "image"]
    shown = torch.linspace(0, len(steps), SNAPSHOTS).round().long().tolist()
    images = [states[i][digit] for digit in range(len(FIRST)) for states in (xt, x0) for i in shown]
    return captioned(
        grid(to_uint8(torch.stack(images)), SNAPSHOTS, scale=4),
        [caption for digit in FIRST for caption in (f'first "{digit.label}": xt', "predicted x0")],
        [times[i] for i in shown],
        f"The reverse process ({PROCESS['sampler'].upper()}, {PROCESS['steps']} steps)",
    )


def frames(noise: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """The walk as frames of a GIF, the first 0 beside the first 1."""
    states = [(noise, f"t = {steps[0].t}")]
    states += [(step.xt, f"t = {following.t}") for step, following in pairwise(steps)]
    states.append((steps[-1].xt, "image"))
    return [captioned(grid(to_uint8(xt), len(FIRST), scale=5, gap=4), title=time) for xt, time in states]


def guidance_row(sampler: DigitSampler, seed: int, options: dict[str, Any]) -> Tensor:
    """The ten digits of the 2025 layout from the same noise, with more guidance in each row."""
    rows = layout_rows("2025")
    digits = [Digit(*row, 1) for row in rows]
    images = [sampler.images(digits, seed, options | {"guidance_scale": scale}) for scale in SCALES]
    return captioned(
        grid(torch.cat(images), len(digits), scale=3),
        [f"scale {scale:g}" for scale in SCALES],
        [str(label) for _, label in rows],
        "A column a digit, always from the same noise; a row a guidance scale (1 = none)",
    )


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=ROOT / "outputs" / "p1_figures", help="folder that gets the figures")
    files.add_argument("--data", type=Path, help="the course's digits folder, if not hw2_data/digits")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def read_examples(data: Path | None, size: int) -> dict[str, LabelledImages]:
    """Real images that no shipped model was trained on, by domain; none if there is no data at the usual place."""
    if data is None and not DATA.is_dir():
        print(f"{DATA} is not there, so the grids have no column of real images; name another folder with --data")
        return {}
    return {domain: images.split()[1] for domain, images in read_digits(data or DATA, size=size).items()}


def main(args) -> list[Path]:
    """Draw all figures; returns their files."""
    sampler = make_sampler(args)
    options = sampling_options(args, sampler)
    if sampler.domains != DOMAINS:
        raise UserError(f"{args.weights}: draws {', '.join(sampler.domains)}, not the digits; name other --weights")
    with staged(args.out) as stage:
        real = read_examples(args.data, sampler.about["image_size"])
        with Progress(3, "figures", "figure") as phase:
            pictures = grids(sampler, args.seed, options, real)
            phase.update()
            noise, steps = reverse_walk(sampler, args.seed, options)
            pictures["reverse_process.png"] = snapshots(noise, steps)
            phase.update()
            pictures["guidance.png"] = guidance_row(sampler, args.seed, options)
            phase.update()
        for name, picture in pictures.items():
            save_png(stage / name, picture)
        save_gif(stage / "reverse_process.gif", frames(noise, steps), milliseconds=80)
    names = [*pictures, "reverse_process.gif"]
    say(f"{len(names)} figures in {args.out}: {', '.join(names)}")
    return [args.out / name for name in names]


if __name__ == "__main__":
    run(main, parse_arguments())

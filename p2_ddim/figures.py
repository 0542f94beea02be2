"""Draw the report's figures: faces by eta, both interpolation strips, a walk through all noises, random faces.

python figures.py
python figures.py NOISE OUT UNet.pt --only eta strips
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import replace

import torch
from torch import Tensor

from common.cli import Parser, UserError, progress, run, say
from common.images import captioned, grid, save_gif, save_png, staged
from p2_ddim.interpolate import draw_interpolations, enlargement, walk
from p2_ddim.noise import Noise, named, random_noises
from p2_ddim.sample import HERE, add_sampling_arguments, add_source_arguments, ddim_options, noises_for, sampler_from
from p2_ddim.sampler import DDIMOptions, FaceSampler

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = ("00", "01", "02", "03")
FIGURES = ("eta", "strips", "walk", "faces")


def eta_grid(sampler: FaceSampler, noises: Sequence[Noise], options: DDIMOptions, batch_size: int | None) -> Tensor:
    """A row an eta, a column a noise: uint8 (3, height, width)."""
    rows = [sampler.pictures(noises, replace(options, eta=eta), batch_size) for eta in ETAS]
    picture = grid(torch.cat(rows), len(noises), scale=enlargement(rows[0].shape[-1]))
    return captioned(picture, [f"eta {eta:g}" for eta in ETAS], [noise.name for noise in noises])


def random_faces(sampler: FaceSampler, count: int, options: DDIMOptions, batch_size: int | None) -> Tensor:
    """Faces from fresh noises of the seed, ten a row: uint8 (3, height, width)."""
    size, channels = sampler.about["image_size"], sampler.model.config.image_channels
    noises = random_noises(count, (channels, size, size), options.seed)
    return grid(sampler.pictures(noises, options, batch_size), columns=10)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    add_source_arguments(parser, HERE.parent / "outputs" / "p2_figures")
    figures = parser.add_argument_group("figures")
    figures.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="which figures")
    figures.add_argument("--faces", type=int, default=100, help="random faces")
    figures.add_argument("--frames", type=int, default=12, help="frames of the GIF from each noise to the next")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written.

    Raises:
        UserError: bad arguments, noises or weights, or a folder that cannot be written; nothing is written then.
    """
    if args.faces < 1 or args.frames < 1:
        raise UserError(f"--faces {args.faces} --frames {args.frames}: both start at 1")
    options = ddim_options(args)
    sampler = sampler_from(args)
    noises = noises_for(sampler, args.noise)
    shown = named(noises, SHOWN) if {"eta", "strips"} & set(args.only) else []
    with staged(args.out) as stage:
        for figure in progress([name for name in FIGURES if name in args.only], "figures", "figure"):
            if figure == "eta":
                save_png(stage / "eta.png", eta_grid(sampler, shown, options, args.batch_size))
            elif figure == "strips":
                draw_interpolations(stage, sampler, *shown[:2], options, args.batch_size)
            elif figure == "walk":
                save_gif(stage / "walk.gif", walk(sampler, noises, args.frames, options, args.batch_size), hold=100)
            else:
                save_png(stage / "faces.png", random_faces(sampler, args.faces, options, args.batch_size))
        names = sorted(path.name for path in stage.iterdir())
    say(f"{', '.join(names)} in {args.out}")
    return [args.out / name for name in names]


if __name__ == "__main__":
    run(main, parse_arguments())

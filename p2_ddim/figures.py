"""Draw the report's figures: faces by eta, the ways between two noises, a walk through all of them, random faces.

python figures.py --out outputs/p2_figures
python figures.py --noise NOISE --weights UNet.pt --only eta strips --between 03 07
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor

from common.cli import Parser, UserError, check, progress, run, say
from common.files import printable
from common.images import add_captions, grid, plain_text, save_gif, save_png
from common.output import stage_folder
from p2_ddim.noise import METHODS, STRIP, Noise, between, random_noises
from p2_ddim.sample import EXAMPLES, OUTPUT, WEIGHTS, add_sampling_arguments, make_sampler, noises_for
from p2_ddim.sampler import DDIMOptions, FaceSampler

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIGURES = ("eta", "strips", "walk", "faces")


def enlarge(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images (N, 3, H, W) in rows, each enlarged to about 128 pixels: uint8 (3, height, width)."""
    return grid(images, columns, scale=max(1, 128 // images.shape[-1]), gap=gap)


def draw_etas(sampler: FaceSampler, noises: Sequence[Noise], options: DDIMOptions) -> Tensor:
    """A row an eta, a column a noise: uint8 (3, height, width)."""
    rows = [sampler.pictures(noises, replace(options, eta=eta)) for eta in ETAS]
    picture = enlarge(torch.cat(rows), len(noises))
    return add_captions(picture, [f"eta {eta:g}" for eta in ETAS], [noise.name for noise in noises])


def draw_strip(sampler: FaceSampler, a: Noise, b: Noise, method: str, options: DDIMOptions) -> Tensor:
    """Eleven faces from a to b with alpha and the length of each noise above: uint8 (3, height, width)."""
    path = between(a, b, method)
    captions = [f"{alpha:.1f}: |xT| {float(noise.xt.norm()):.1f}" for alpha, noise in zip(STRIP, path)]
    title = f"{method} from {a.name} to {b.name}; sqrt(D) = {math.sqrt(a.xt.numel()):.1f}"
    return add_captions(enlarge(sampler.pictures(path, options), len(path)), columns=captions, title=title)


@plain_text()
def plot_lengths(path: Path, a: Noise, b: Noise) -> None:
    """Plot |xT| along both ways from a to b beside the shell sqrt(D) that Gaussian noise lies on."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    alphas = [k / 100 for k in range(101)]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    title = f"Length of the noise between {printable(a.name)} and {printable(b.name)}"
    axes = figure.add_subplot(title=title, xlabel="alpha", ylabel="|xT|", xlim=(0, 1))
    for method in METHODS:
        lengths = [float(noise.xt.norm()) for noise in between(a, b, method, alphas)]
        axes.plot(alphas, lengths, label=f"{method}: {lengths[50]:.1f} in the middle")
    shell = math.sqrt(a.xt.numel())
    axes.axhline(shell, color="black", linestyle="dotted", label=f"sqrt(D) = {shell:.1f}")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_walk(sampler: FaceSampler, noises: Sequence[Noise], frames: int, options: DDIMOptions) -> list[Tensor]:
    """Faces along slerp through all noises and back to the first, `frames` from each to the next."""
    alphas = [k / frames for k in range(frames)]
    path = [noise for a, b in zip(noises, [*noises[1:], noises[0]]) for noise in between(a, b, "slerp", alphas)]
    return [enlarge(picture[None], 1, gap=0) for picture in sampler.pictures(path, options)]


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    files, figures = parser.add_argument_group("files"), parser.add_argument_group("figures")
    files.add_argument("--out", type=Path, default=OUTPUT.with_name("p2_figures"), help="folder for the figures")
    files.add_argument("--noise", type=Path, default=EXAMPLES / "noise", help="folder of noises, or one file")
    files.add_argument("--weights", type=Path, default=WEIGHTS, help="UNet.pt, or weights of train.py")
    figures.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="which figures to draw")
    figures.add_argument("--between", nargs=2, metavar="NAME", help="ends of the strips (default: the first two)")
    figures.add_argument("--frames", type=int, default=12, help="frames of the walk from each noise to the next")
    figures.add_argument("--faces", type=int, default=100, help="number of random faces")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written."""
    check("faces", args.faces, args.faces > 0, "above 0")
    check("frames", args.frames, args.frames > 0, "above 0")
    sampler, options = make_sampler(args)
    noises = noises_for(sampler, args.noise)
    if len(noises) < 2 and {"strips", "walk"} & set(args.only):
        raise UserError(f"{args.noise}: holds one noise; a way between noises takes two")
    by_name = {noise.name: noise for noise in noises}
    names = args.between or list(by_name)[:2]
    for name in names:
        check("between", name, name in by_name, f"one of {', '.join(by_name)}")
    ends = [by_name[name] for name in names]
    with stage_folder(args.out) as stage:
        for figure in progress([name for name in FIGURES if name in args.only], "figures", "figure"):
            if figure == "eta":
                save_png(stage / "eta.png", draw_etas(sampler, noises[:4], options))
            elif figure == "strips":
                for method in METHODS:
                    save_png(stage / f"strip_{method}.png", draw_strip(sampler, *ends, method, options))
                plot_lengths(stage / "lengths.png", *ends)
            elif figure == "walk":
                save_gif(stage / "walk.gif", draw_walk(sampler, noises, args.frames, options), hold=100)
            else:
                faces = sampler.pictures(random_noises(args.faces, sampler.shape, options.seed), options)
                save_png(stage / "faces.png", grid(faces, columns=10))
        files = sorted(path.name for path in stage.iterdir())
    say(f"{', '.join(files)} in {args.out}")
    return [args.out / name for name in files]


if __name__ == "__main__":
    run(main, parse_arguments())

"""Draw the faces between two noises, along the sphere (slerp) and along the straight line (lerp).

python interpolate.py --between 03 07        # two strips of eleven, and a plot of how long the noises are
python interpolate.py --json lengths.json    # and the lengths themselves
python interpolate.py --walk                 # a GIF that walks through all noises and back to the first

Gaussian noise of D values has length sqrt(D), almost exactly. Slerp keeps that length; lerp cuts through the sphere,
and the network, which has never seen noise so short, draws a washed-out face in the middle.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from common.cli import Parser, UserError, add_json_argument, check_json, run, say, write_json
from common.images import captioned, grid, save_gif, save_png, staged
from common.runtime import seeded_generator
from p2_ddim.noise import Noise, named
from p2_ddim.sample import HERE, add_sampling_arguments, add_source_arguments, ddim_options, noises_for, sampler_from
from p2_ddim.sampler import DDIMOptions, FaceSampler

STRIP = tuple(k / 10 for k in range(11))


def lerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b: the straight line from a to b."""
    return (1 - alpha) * a + alpha * b


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The great circle from a to b, over all values together (Shoemake 1985; Song et al. 2021, section 5.3).

    sin((1 - alpha) theta) / sin(theta) a + sin(alpha theta) / sin(theta) b, with theta the angle between a and b. The
    ends are exact. Between parallel noises the circle is the straight line; between opposite ones it may pass anywhere,
    and passes through a direction that is always the same.

    Args:
        a: noise of any shape.
        b: noise of that shape.
        alpha: 0 for a, 1 for b.
    """
    if alpha in (0, 1):
        return b if alpha else a
    if not a.any() or not b.any():
        return lerp(a, b, alpha)
    a_unit, b_unit = a.double() / a.double().norm(), b.double() / b.double().norm()
    # Unlike the arc cosine of a product, this keeps small angles and those near pi (Kahan 2006).
    theta = 2 * math.atan2(float((a_unit - b_unit).norm()), float((a_unit + b_unit).norm()))
    if math.sin(theta) > 1e-6:
        from_a, from_b = (math.sin(part * theta) / math.sin(theta) for part in (1 - alpha, alpha))
        return from_a * a + from_b * b
    if theta < 1:
        return lerp(a, b, alpha)
    aside = torch.randn(a.shape, generator=seeded_generator(0), dtype=torch.float64).to(a.device)
    aside -= (aside * a_unit).sum() * a_unit
    straight = lerp(a, -b, alpha)  # from |a| to |b| in the direction of a
    turn = straight.norm() / aside.norm() * aside
    return math.cos(alpha * math.pi) * straight + math.sin(alpha * math.pi) * turn.to(a.dtype)


METHODS = {"slerp": slerp, "lerp": lerp}


def between(a: Noise, b: Noise, method: str, alphas: Sequence[float] = STRIP) -> list[Noise]:
    """The noises at these points of the way from a to b.

    Raises:
        UserError: the two differ in shape.
    """
    if a.xt.shape != b.xt.shape:
        raise UserError(f"noises {a.name} and {b.name}: shapes {tuple(a.xt.shape)} and {tuple(b.xt.shape)} differ")
    return [Noise(f"{a.name}-{b.name}-{alpha:g}", METHODS[method](a.xt, b.xt, alpha)) for alpha in alphas]


def enlargement(image_size: int) -> int:
    """How much images of this size are enlarged in figures."""
    return max(1, 128 // image_size)


def strip(
    sampler: FaceSampler, a: Noise, b: Noise, method: str, options: DDIMOptions, batch_size: int | None
) -> Tensor:
    """Eleven faces from a to b with alpha and the length of each noise above: uint8 (3, height, width)."""
    path = between(a, b, method)
    pictures = sampler.pictures(path, options, batch_size)
    captions = [f"{alpha:.1f}: |xT| {float(noise.xt.norm()):.1f}" for alpha, noise in zip(STRIP, path)]
    title = f"{method} from {a.name} to {b.name}; sqrt(D) = {math.sqrt(a.xt.numel()):.1f}"
    picture = grid(pictures, len(STRIP), scale=enlargement(pictures.shape[-1]))
    return captioned(picture, columns=captions, title=title)


def lengths(a: Noise, b: Noise, alphas: Sequence[float] = STRIP) -> dict[str, list[float]]:
    """|xT| of the noises at these points of the way from a to b, by method."""
    return {method: [float(noise.xt.norm()) for noise in between(a, b, method, alphas)] for method in METHODS}


def plot_lengths(path: Path, a: Noise, b: Noise) -> None:
    """Plot |xT| along both ways from a to b beside the shell sqrt(D) that Gaussian noise lies on."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    alphas = [k / 100 for k in range(101)]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(
        title=f"Length of the noise between {a.name} and {b.name}", xlabel="alpha", ylabel="|xT|", xlim=(0, 1)
    )
    for method, along in lengths(a, b, alphas).items():
        axes.plot(alphas, along, label=f"{method}: {along[50]:.1f} in the middle")
    shell = math.sqrt(a.xt.numel())
    axes.axhline(shell, color="black", linestyle="dotted", label=f"sqrt(D) = {shell:.1f}")
    axes.legend()
    figure.savefig(path, dpi=120)


def walk(
    sampler: FaceSampler, noises: Sequence[Noise], frames: int, options: DDIMOptions, batch_size: int | None
) -> list[Tensor]:
    """Faces along slerp through all noises and back to the first, `frames` from each to the next."""
    alphas = [k / frames for k in range(frames)]
    path = [noise for a, b in zip(noises, [*noises[1:], noises[0]]) for noise in between(a, b, "slerp", alphas)]
    pictures = sampler.pictures(path, options, batch_size)
    return [grid(picture[None], 1, scale=enlargement(pictures.shape[-1]), gap=0) for picture in pictures]


def draw_interpolations(
    folder: Path, sampler: FaceSampler, a: Noise, b: Noise, options: DDIMOptions, batch_size: int | None
) -> None:
    """Write both strips and the plot of lengths for two noises."""
    for method in METHODS:
        save_png(folder / f"strip_{method}.png", strip(sampler, a, b, method, options, batch_size))
    plot_lengths(folder / "lengths.png", a, b)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="interpolate.py", description=__doc__)
    add_source_arguments(parser, HERE.parent / "outputs" / "p2_interpolation")
    way = parser.add_argument_group("way")
    way.add_argument("--between", nargs=2, metavar="NAME", help="the two noises (default: the first two)")
    way.add_argument("--walk", action="store_true", help="draw the GIF through all noises instead")
    way.add_argument("--frames", type=int, default=12, help="frames of the GIF from each noise to the next")
    add_json_argument(parser, "write how long the noises between the two are to this file")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written.

    Raises:
        UserError: bad arguments, noises or weights, or a folder that cannot be written; nothing is written then.
    """
    options = ddim_options(args)
    if args.frames < 1:
        raise UserError(f"--frames {args.frames}: must be at least 1")
    if args.walk and args.json:
        raise UserError("--json: has the lengths between two noises; leave --walk or --json out")
    sampler = sampler_from(args)
    noises = noises_for(sampler, args.noise)
    if len(noises) < 2:
        raise UserError(f"{args.noise}: holds one noise; what lies between takes two")
    a, b = named(noises, args.between) if args.between else noises[:2]
    check_json(args.json)
    with staged(args.out) as stage:
        if args.walk:
            save_gif(stage / "walk.gif", walk(sampler, noises, args.frames, options, args.batch_size), hold=100)
        else:
            draw_interpolations(stage, sampler, a, b, options, args.batch_size)
        names = sorted(path.name for path in stage.iterdir())
    if args.json:
        shell = math.sqrt(a.xt.numel())
        write_json(args.json, {"between": [a.name, b.name], "sqrt_d": shell, "alphas": list(STRIP)} | lengths(a, b))
    say(f"{', '.join(names)} in {args.out}")
    return [args.out / name for name in names]


if __name__ == "__main__":
    run(main, parse_arguments())

"""Draw the report's figures: control, output and target; two circles; the control's strength; how training went.

python figures.py
python figures.py --only two --single runs/p3_single/controlnet     # ours beside one trained on single circles alone
python figures.py --only story --run runs/p3                        # from the pictures that train.py drew
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.cli import Parser, UserError, progress, run, say
from common.images import captioned, grid, save_png, staged
from latent_diffusion.pairs import Pair, read_hints, read_pairs
from p3_controlnet.make_examples import TWO
from p3_controlnet.model import ControlNet, check_fit
from p3_controlnet.sample import BASE, EXAMPLES, HERE, add_sampling_arguments, sampler_from
from p3_controlnet.sampler import HintSampler

SINGLE = HERE / "weights" / "controlnet_single"
FIGURES = ("sides", "two", "strength", "story")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SEEDS = 4  # columns of the two-circle figure for each prompt
SHOWN = 8  # examples in a figure
MOMENTS = 6  # rows of the training story


def drawn(sampler: HintSampler, pairs: Sequence[Pair], hints: Tensor, batch_size: int) -> Tensor:
    """The pictures of the pairs, uint8 (N, 3, H, W)."""
    return torch.stack([picture for _, picture in sampler.images(pairs, hints, batch_size)])


def sides(sampler: HintSampler, pairs: Sequence[Pair], hints: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """A column a pair: its hint, what is drawn, and its target."""
    picture = grid(torch.cat([hints, drawn(sampler, pairs, hints, batch_size), targets]), columns=len(pairs))
    return captioned(picture, rows=["control", "output", "target"])


def with_options(sampler: HintSampler, controlnets: Sequence[ControlNet] | None = None, **changes) -> HintSampler:
    """The same sampler with other options, perhaps with other ControlNets."""
    return HintSampler(sampler.base, controlnets or sampler.unet.controlnets, replace(sampler.options, **changes))


def two_circles(samplers: dict[str, HintSampler], pairs: Sequence[Pair], hints: Tensor, batch_size: int) -> Tensor:
    """A row a sampler, by name; columns are the hint and, for each prompt, pictures of several seeds."""
    rows = []
    for sampler in samplers.values():
        seeds = range(sampler.options.seed, sampler.options.seed + SEEDS)
        by_seed = [drawn(with_options(sampler, seed=seed), pairs, hints, batch_size) for seed in seeds]
        rows += [hints[:1], *(pictures[k : k + 1] for k in range(len(pairs)) for pictures in by_seed)]
    columns = 1 + len(pairs) * SEEDS
    captions = ["control", *(f"prompt {1 + k // SEEDS}" for k in range(columns - 1))]
    title = "   ".join(f"{k}: {pair.prompt}" for k, pair in enumerate(pairs, start=1))
    return captioned(grid(torch.cat(rows), columns), rows=list(samplers), columns=captions, title=title)


def strengths(sampler: HintSampler, pairs: Sequence[Pair], hints: Tensor, batch_size: int) -> Tensor:
    """A row a pair: its hint, and what is drawn at each strength of the control."""
    columns = [hints] + [
        drawn(with_options(sampler, control_scale=(strength,)), pairs, hints, batch_size) for strength in STRENGTHS
    ]
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    return captioned(grid(rows, len(columns)), columns=["control", *(f"{strength:g}" for strength in STRENGTHS)])


def story(folder: Path) -> Tensor:
    """What `train.py` drew at several steps of its run, always of the same noise, from top to bottom.

    Raises:
        UserError: the run drew no pictures.
    """
    files = sorted(folder.glob("samples_*.png"))
    if not files:
        raise UserError(f"{folder}: holds no samples_*.png; name a folder that train.py wrote")
    # More of the beginning, where control appears.
    chosen = [files[k] for k in sorted({round((len(files) - 1) * (i / (MOMENTS - 1)) ** 2) for i in range(MOMENTS)})]
    pictures = [
        torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1) for file in chosen
    ]
    third = pictures[0].shape[1] // 3  # rows of hints, of outputs and of targets
    parts = [pictures[0][:, :third], *(picture[:, third : 2 * third] for picture in pictures)]
    steps = [f"step {int(file.stem.split('_')[1])}" for file in chosen]
    return captioned(torch.cat(parts, dim=1), rows=["control", *steps])


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    output = HERE.parent / "outputs" / "p3_figures"
    parser.add_argument("out", type=Path, nargs="?", default=output, metavar="OUT", help="folder for the figures")
    figures = parser.add_argument_group("figures")
    figures.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="which figures")
    figures.add_argument("--base", type=Path, default=BASE, help="the frozen model: a diffusers folder")
    figures.add_argument("--examples", type=Path, default=EXAMPLES, help="prompt.json, source/ and target/")
    figures.add_argument("--two", default=TWO, metavar="SOURCE", help="the examples' hint with two circles")
    figures.add_argument("--single", type=Path, default=SINGLE, metavar="FOLDER", help="ControlNet of single circles")
    figures.add_argument("--run", type=Path, help="folder of a training run, for its story")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written. The story needs --run; without one it is left out.

    Raises:
        UserError: bad arguments, examples or weights, or a folder that cannot be written; nothing is written then.
    """
    wanted = [name for name in args.only if name != "story" or args.run]
    if not wanted:
        raise UserError("--only story: needs the folder of a run; name it with --run")
    pictures = {"story": story(args.run)} if "story" in wanted else {}
    if set(wanted) - {"story"}:
        sampler = sampler_from(args)
        pairs = read_pairs(args.examples / "prompt.json")
        hints = read_hints(pairs, args.examples, sampler.size)
        both = [k for k, pair in enumerate(pairs) if pair.source == args.two]
        shown = [k for k in range(len(pairs)) if k not in both][:SHOWN]
        some, theirs = [pairs[k] for k in shown], hints[shown]
    if "two" in wanted:
        if not both:
            raise UserError(f"{args.examples / 'prompt.json'}: no line has the source {args.two}; name one with --two")
        samplers = {"both": sampler}
        if args.single.exists():
            single, _ = ControlNet.load(args.single)
            check_fit(single, sampler.base, str(args.single))
            samplers = {"trained on one": with_options(sampler, [single]), "trained on both": sampler}
    for figure in progress([name for name in FIGURES if name in wanted and name != "story"], "figures", "figure"):
        if figure == "sides":
            targets = read_hints(some, args.examples, sampler.size, "target")
            pictures[figure] = sides(sampler, some, theirs, targets, args.batch_size)
        elif figure == "two":
            pictures[figure] = two_circles(samplers, [pairs[k] for k in both], hints[both], args.batch_size)
        else:
            pictures[figure] = strengths(sampler, some[: SHOWN // 2], theirs[: SHOWN // 2], args.batch_size)
    with staged(args.out) as stage:
        for name, picture in pictures.items():
            save_png(stage / f"{name}.png", picture)
    say(f"{', '.join(f'{name}.png' for name in pictures)} in {args.out}")
    return [args.out / f"{name}.png" for name in pictures]


if __name__ == "__main__":
    run(main, parse_arguments())

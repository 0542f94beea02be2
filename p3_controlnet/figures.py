"""Draw the report's figures: control, output and target; two circles; the control's strength.

python figures.py                                                   # into outputs/p3_figures
python figures.py --only two --single runs/p3_single/controlnet     # beside a ControlNet trained on single circles
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor

from common.cli import Parser, UserError, run, say
from common.images import add_captions, grid, save_png
from common.output import stage_folder
from latent_diffusion.miniature import BASE
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet.fill50k import REPORT_HINT
from p3_controlnet.model import ControlNet, check_fit
from p3_controlnet.sample import EXAMPLES, HERE, add_sampling_arguments, load_sampler
from p3_controlnet.sampler import HintOptions, HintSampler, Item

SINGLE = HERE / "weights" / "controlnet_single"
FIGURES = ("sides", "two", "strength")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SEEDS = 4  # columns of the two-circle figure for each prompt
SHOWN = 8  # examples in a figure


def draw_pictures(sampler: HintSampler, items: Sequence[Item], options: HintOptions, **changes) -> Tensor:
    """The items' pictures, uint8 (N, 3, H, W), drawn with some options changed."""
    return torch.stack([picture for _, picture in sampler.images(items, replace(options, **changes))])


def show_sides(sampler: HintSampler, items: Sequence[Item], options: HintOptions, folder: Path) -> Tensor:
    """A column an item: its hint, what is drawn, and its target, which lies in the folder."""
    pairs, hints = zip(*items)
    targets = read_hints(pairs, folder, hints[0].shape[-1], "target")
    rows = torch.stack(hints), draw_pictures(sampler, items, options), targets
    return add_captions(grid(torch.cat(rows), columns=len(items)), rows=["control", "output", "target"])


def show_two_circles(samplers: dict[str, HintSampler], items: Sequence[Item], options: HintOptions) -> Tensor:
    """A row a sampler, by name; columns are the hint and, for each prompt, pictures of several seeds."""
    rows = []
    for sampler in samplers.values():
        seeds = range(options.seed, options.seed + SEEDS)
        by_seed = [draw_pictures(sampler, items, options, seed=seed) for seed in seeds]
        rows += [items[0][1][None], *(pictures[k : k + 1] for k in range(len(items)) for pictures in by_seed)]
    columns = 1 + len(items) * SEEDS
    captions = ["control", *(f"prompt {1 + k // SEEDS}" for k in range(columns - 1))]
    title = "   ".join(f"{k}: {pair.prompt}" for k, (pair, _) in enumerate(items, start=1))
    return add_captions(grid(torch.cat(rows), columns), rows=list(samplers), columns=captions, title=title)


def show_strengths(sampler: HintSampler, items: Sequence[Item], options: HintOptions) -> Tensor:
    """A row an item: its hint, and what is drawn at each strength of the control."""
    columns = [torch.stack([hint for _, hint in items])]
    columns += [draw_pictures(sampler, items, options, control_scale=(strength,)) for strength in STRENGTHS]
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    return add_captions(grid(rows, len(columns)), columns=["control", *(f"{strength:g}" for strength in STRENGTHS)])


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    figures = parser.add_argument_group("figures")
    output = HERE.parent / "outputs" / "p3_figures"
    figures.add_argument("--out", type=Path, default=output, metavar="DIR", help="folder for the figures")
    figures.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="which figures")
    figures.add_argument("--base", type=Path, default=BASE, help="the frozen model: one file or a diffusers folder")
    figures.add_argument("--examples", type=Path, default=EXAMPLES, help="folder with prompt.json, source/ and target/")
    figures.add_argument("--single", type=Path, default=SINGLE, metavar="PATH", help="ControlNet of single circles")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written."""
    sampler, options = load_sampler(args)
    pairs, pictures = read_pairs(args.examples / "prompt.json"), {}
    items = list(zip(pairs, read_hints(pairs, args.examples, sampler.sides(options)[0])))
    two = [item for item in items if item[0].source == REPORT_HINT]
    singles = [item for item in items if item[0].source != REPORT_HINT][:SHOWN]
    if "two" in args.only:
        if not two:
            raise UserError(f"{args.examples / 'prompt.json'}: no line has the source {REPORT_HINT}; add one")
        samplers = {"both": sampler}
        if args.single.exists():
            single, _ = ControlNet.load(args.single)
            check_fit(single, sampler.base, args.single)
            samplers = {"trained on one": HintSampler(sampler.base, [single]), "trained on both": sampler}
        pictures["two"] = show_two_circles(samplers, two, options)
    if "sides" in args.only:
        pictures["sides"] = show_sides(sampler, singles, options, args.examples)
    if "strength" in args.only:
        pictures["strength"] = show_strengths(sampler, singles[: SHOWN // 2], options)
    with stage_folder(args.out) as stage:
        for name, picture in pictures.items():
            save_png(stage / f"{name}.png", picture)
    say(f"{', '.join(f'{name}.png' for name in pictures)} in {args.out}")
    return [args.out / f"{name}.png" for name in pictures]


if __name__ == "__main__":
    run(main, parse_arguments())

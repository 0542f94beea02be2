"""Draw the report's figures: photos beside what the words learned from them draw, and two concepts in one picture.

python figures.py                                            # the miniature's, into outputs/p3_2024_figures
python figures.py --out DIR --table input.json --references FOLDER --base sd-v1-4.ckpt --words FILE --custom FILE

learned.png shows the photos of each concept above what its first prompt draws. both.png shows a prompt with two
concepts, drawn from the same noise with textual inversion and with Custom Diffusion; for the miniature it also says how
many of --count pictures show both concepts, and both.json has the numbers.
"""

import json
import sys
from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.cli import Parser, UserError, check, run, say
from common.images import add_captions, grid, save_png
from common.output import stage_folder
from latent_diffusion.base import Base
from latent_diffusion.drawing import PromptOptions, add_drawing_flags, draw_prompts
from latent_diffusion.miniature import BASE
from latent_diffusion.miniature.regions import concept_colour, shows_colours
from p3_personalization.evaluate import read_references
from p3_personalization.generate import (
    CUSTOM,
    CUSTOM_DIFFUSION,
    EXAMPLES,
    INVERSION,
    ROOT,
    TABLE,
    WORDS,
    TableEntry,
    drawing_options,
    is_miniature,
    load_plain,
    prompt_items,
    read_table,
)
from p3_personalization.words import check_prompts, with_learned

TWO = "a {} next to a {}"
MINIATURE_TWO = "{} circle and {} circle with gray background"
VIEWS = 5  # pictures of one concept in a row
SHOWN = 8  # pictures of two concepts in a row


def draw_learned(
    bases: Mapping[str, Base],
    entries: Sequence[TableEntry],
    references: Mapping[str, Sequence[np.ndarray]],
    options: PromptOptions,
) -> Tensor:
    """The figure of single concepts: a row of photos each, and for each method a row of what the first prompt draws."""
    rows, captions = [], []
    for entry in entries:
        drawn = [draw_prompts(base, prompt_items(entry.prompts[0], VIEWS), options) for base in bases.values()]
        photos = torch.full_like(drawn[0], 255)  # white where there are too few
        for k, photo in enumerate(references[entry.number][:VIEWS]):
            fitted = ImageOps.fit(Image.fromarray(photo), photos.shape[2:], Image.Resampling.LANCZOS)
            photos[k] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
        rows += [photos, *drawn]
        captions += [f"{entry.token} learned from", *bases]
    title = "   ".join(entry.prompts[0] for entry in entries)
    return add_captions(grid(torch.cat(rows), VIEWS), rows=captions, title=title)


def draw_both(
    bases: Mapping[str, Base], prompt: str, colours: Sequence[np.ndarray], count: int, options: PromptOptions
) -> tuple[Tensor, dict[str, Any]]:
    """The figure of two concepts in one picture, a row a method, and the share of pictures that show both.

    `colours` are those of the concepts' discs, sRGB (3,) each; if they are empty, nothing is counted.
    """
    rows, captions, numbers = [], [], {"prompt": prompt, "count": count, "seed": options.seed}
    for name, base in bases.items():
        drawn = draw_prompts(base, prompt_items(prompt, count), options)
        rows.append(drawn[:SHOWN])
        captions.append(name)
        if colours:
            shown = sum(all(shows_colours(picture.permute(1, 2, 0).numpy(), colours)) for picture in drawn)
            numbers[name] = shown / count
            captions[-1] += f": {shown} of {count} show both"
    return add_captions(grid(torch.cat(rows), len(rows[0])), rows=captions, title=prompt), numbers


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    figures = parser.add_argument_group("figures")
    figures.add_argument("--out", type=Path, default=ROOT / "outputs/p3_2024_figures", help="folder for the figures")
    figures.add_argument("--prompt", metavar="TEXT", help=f'prompt with two concepts (default: as "{TWO}")')
    figures.add_argument("--count", type=int, default=50, help="pictures of two concepts, for each method")
    discs = "count pictures with discs of both colours (default: for the miniature)"
    figures.add_argument("--discs", action=BooleanOptionalAction, help=discs)
    files = parser.add_argument_group("what was learned")
    files.add_argument("--table", type=Path, default=TABLE, metavar="INPUT_JSON", help="concepts and prompts")
    files.add_argument("--references", type=Path, default=EXAMPLES, metavar="FOLDER", help="photos, a folder a concept")
    files.add_argument("--base", type=Path, default=BASE, metavar="SD_CKPT", help="frozen model")
    words = "textual inversion's words"
    files.add_argument("--words", type=Path, nargs="+", default=[WORDS], metavar="FILE", help=words)
    files.add_argument("--custom", type=Path, default=CUSTOM, metavar="FILE", help="Custom Diffusion's file")
    add_drawing_flags(parser, sampler="dpm-solver++")
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written."""
    check("count", args.count, args.count >= 1, "at least 1")
    options, miniature = drawing_options(args), is_miniature(args.base)
    entries = read_table(args.table)
    if len(entries) < 2:
        raise UserError(f"{args.table}: has one concept; both.png needs two")
    references = read_references(args.references, entries)
    tokens = [entry.token for entry in entries[:2]]
    prompt = args.prompt or (MINIATURE_TWO if miniature else TWO).format(*tokens)
    with_discs = miniature if args.discs is None else args.discs
    colours = [concept_colour(references[entry.number], entry.number) for entry in entries[:2] if with_discs]
    plain = load_plain(args)
    bases = {INVERSION: with_learned(plain, args.words), CUSTOM_DIFFUSION: with_learned(plain, [], args.custom)}
    for base in bases.values():
        for token in tokens:
            check_prompts(base.tokenizer, [prompt], token, "--prompt: ")
        check_prompts(base.tokenizer, [entry.prompts[0] for entry in entries], mention=f"{args.table}: ")
    with stage_folder(args.out) as stage:
        save_png(stage / "learned.png", draw_learned(bases, entries, references, options))
        picture, numbers = draw_both(bases, prompt, colours, args.count, options)
        save_png(stage / "both.png", picture)
        (stage / "both.json").write_text(json.dumps(numbers, indent=1) + "\n")
    for name in bases if colours else ():
        print(f"{name}: {numbers[name]:.0%} of {args.count} pictures show both of {prompt!r}")
    say(f"learned.png, both.png, both.json in {args.out}")
    return [args.out / name for name in ("learned.png", "both.png", "both.json")]


if __name__ == "__main__":
    run(main, parse_arguments())

"""Draw the report's figures: what words were learned from beside what they draw, and two concepts in one picture.

python figures.py                                            # the miniature's, into outputs/p3_2024_figures
python figures.py OUT --table input.json --references FOLDER --base sd-v1-4.ckpt --words FILE --custom FILE

learned.png has the pictures that a concept was learned from, and what its first prompt draws. both.png has a prompt
with two concepts, as textual inversion alone and as Custom Diffusion draw it from the same noise; for the miniature it
also tells how many of --count pictures show both, and both.json keeps the numbers.
"""

import json
import sys
from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.cli import Parser, UserError, progress, run, say
from common.images import captioned, grid, save_png, staged
from latent_diffusion.base import Base
from latent_diffusion.miniature.regions import concept_colour, shows_colours
from p3_personalization.evaluate import read_references
from p3_personalization.generate import (
    BASE,
    CUSTOM,
    CUSTOM_DIFFUSION,
    EXAMPLES,
    INVERSION,
    ROOT,
    WORDS,
    DrawingOptions,
    add_drawing_arguments,
    drawing_options,
    is_miniature,
    load_plain,
    pictures,
    with_learned,
)
from p3_personalization.table import Concept, read_table
from p3_personalization.words import check_prompts

FIGURES = ("learned", "both")
TWO = "a {} next to a {}"
MINIATURE_TWO = "{} circle and {} circle with gray background"
VIEWS = 5  # pictures of a concept in a row
SHOWN = 8  # pictures of two concepts in a row


def views_of(references: Sequence[np.ndarray], size: int) -> Tensor:
    """The first pictures of a concept, white where there are too few: uint8 (VIEWS, 3, size, size)."""
    views = torch.full((VIEWS, 3, size, size), 255, dtype=torch.uint8)
    for k, picture in enumerate(references[:VIEWS]):
        fitted = ImageOps.fit(Image.fromarray(picture), (size, size), Image.Resampling.LANCZOS)
        views[k] = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)
    return views


def drawn(base: Base, prompt: str, count: int, options: DrawingOptions) -> Tensor:
    """The first pictures of a prompt, as generate.py draws them: uint8 (count, 3, H, W)."""
    return torch.stack(list(pictures(base, [(prompt, k) for k in range(count)], options)))


def learned(
    bases: Mapping[str, Base],
    concepts: Sequence[Concept],
    references: Mapping[str, Sequence[np.ndarray]],
    options: DrawingOptions,
) -> Tensor:
    """For each concept a row of the pictures that it was learned from, and one for each method's pictures."""
    rows, captions = [], []
    for concept in concepts:
        results = [drawn(base, concept.prompts[0], VIEWS, options) for base in bases.values()]
        rows += [views_of(references[concept.number], results[0].shape[-1]), *results]
        captions += [f"{concept.token} learned from", *bases]
    title = "   ".join(concept.prompts[0] for concept in concepts)
    return captioned(grid(torch.cat(rows), VIEWS), rows=captions, title=title)


def both(
    bases: Mapping[str, Base], prompt: str, colours: Sequence[np.ndarray] | None, count: int, options: DrawingOptions
) -> tuple[Tensor, dict[str, Any]]:
    """A row a method for a prompt with two concepts, all from the same noise, and how many pictures show both.

    Args:
        bases: what draws, by the method's name.
        prompt: with the words of both concepts.
        colours: of the concepts' discs, sRGB (3,) each; None if they are no discs, and nothing is counted.
        count: pictures to draw and count.
        options: how to draw.

    Returns:
        The figure, and the numbers.
    """
    rows, captions = [], []
    numbers = {"prompt": prompt, "count": count, "seed": options.seed}
    for name, base in bases.items():
        results = drawn(base, prompt, count, options)
        rows.append(results[:SHOWN])
        caption = name
        if colours is not None:
            shown = sum(all(shows_colours(picture.permute(1, 2, 0).numpy(), colours)) for picture in results)
            numbers[name] = shown / count
            caption = f"{name}: {shown} of {count} show both"
        captions.append(caption)
    return captioned(grid(torch.cat(rows), len(rows[0])), rows=captions, title=prompt), numbers


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="figures.py", description=__doc__)
    output = ROOT / "outputs" / "p3_2024_figures"
    parser.add_argument("out", type=Path, nargs="?", default=output, metavar="OUT", help="folder for the figures")
    figures = parser.add_argument_group("figures")
    figures.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="which figures")
    files = parser.add_argument_group("what was learned")
    files.add_argument(
        "--table", type=Path, default=EXAMPLES / "input.json", metavar="INPUT_JSON", help="concepts and prompts"
    )
    files.add_argument(
        "--references", type=Path, default=EXAMPLES, metavar="FOLDER", help="has a folder of pictures a concept"
    )
    files.add_argument("--base", type=Path, default=BASE, metavar="SD_CKPT", help="the frozen model")
    files.add_argument("--words", type=Path, nargs="+", default=[WORDS], metavar="FILE", help="textual inversion's")
    files.add_argument("--custom", type=Path, default=CUSTOM, metavar="FILE", help="Custom Diffusion's")
    figures.add_argument(
        "--prompt", metavar="TEXT", help=f'with two concepts (default: "{TWO}", or the miniature\'s way to say so)'
    )
    figures.add_argument("--count", type=int, default=50, help="pictures with two concepts of each method")
    figures.add_argument(
        "--discs", action=BooleanOptionalAction, help="count discs of both colours (default: for the miniature)"
    )
    add_drawing_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written.

    Raises:
        UserError: bad arguments, a bad table, pictures or weights, or a folder that cannot be written.
    """
    if args.count < 1:
        raise UserError(f"--count {args.count}: starts at 1")
    options = drawing_options(args)
    concepts = read_table(args.table)
    references = {concept.number: read_references(args.references / concept.number) for concept in concepts}
    plain = load_plain(args)
    bases = {
        INVERSION: with_learned(plain, args.words),
        CUSTOM_DIFFUSION: with_learned(plain, [], args.custom),
    }
    prompts = [concept.prompts[0] for concept in concepts] if "learned" in args.only else []
    if "both" in args.only:
        if len(concepts) < 2:
            raise UserError(f"{args.table}: has one concept; two are needed, or --only learned")
        tokens = [concept.token for concept in concepts[:2]]
        two = args.prompt or (MINIATURE_TWO if is_miniature(args.base) else TWO).format(*tokens)
        colours = None
        if is_miniature(args.base) if args.discs is None else args.discs:
            colours = [concept_colour(references[concept.number]) for concept in concepts[:2]]
            if any(colour is None for colour in colours):
                raise UserError(f"{args.references}: not all its pictures show a disc; use --no-discs")
        for base in bases.values():
            for token in tokens:
                check_prompts(base.tokenizer, [two], token, "--prompt: ")
    for base in bases.values():
        check_prompts(base.tokenizer, prompts, mention=f"{args.table}: ")
    written = []
    with staged(args.out) as stage:
        for figure in progress([name for name in FIGURES if name in args.only], "figures", "figure"):
            if figure == "learned":
                save_png(stage / "learned.png", learned(bases, concepts, references, options))
                written.append("learned.png")
                continue
            picture, numbers = both(bases, two, colours, args.count, options)
            save_png(stage / "both.png", picture)
            (stage / "both.json").write_text(json.dumps(numbers, indent=1) + "\n")
            written += ["both.png", "both.json"]
            for name in bases:
                if name in numbers:
                    print(f"{name}: {numbers[name]:.0%} of {args.count} pictures show both of {two!r}")
    say(f"{', '.join(written)} in {args.out}")
    return [args.out / name for name in written]


if __name__ == "__main__":
    run(main, parse_arguments())

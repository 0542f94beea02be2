"""Score drawn concepts: do they look like the photos that they were learned from, and do they follow their prompts?

python evaluate.py input.json OUT REFERENCES --clip FOLDER   # what hw2_3_2024.sh was given and has drawn
python evaluate.py                                           # what it draws by default

REFERENCES/{concept}/ holds the photos that a concept was learned from. Scores of each prompt:
  image   100 x cosine of each picture and each photo, by CLIP; the mean
  text    100 x cosine of each picture and the prompt in the table's "prompt_4_clip_eval", by CLIP
  passed  whether image and text, as means over the five pictures with most image + 2.5 text, reach the baseline

and with --discs, for the miniature:
  difference  CIEDE2000 between the concept's colour and the most similar disc; the median over all pictures
  near        share of pictures where that is at most 10
  shown       share of pictures that show every learned word of the prompt as a disc of its own
"""

import sys
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np
from torch import Tensor

from common.cli import Parser, UserError, check, run
from common.images import list_images, read_image
from common.output import add_json_argument, check_json, write_json
from common.runtime import PRECISIONS, pick_device, pick_precision
from latent_diffusion.clip import Clip
from latent_diffusion.miniature import CLIP
from latent_diffusion.miniature.regions import NEAR, concept_colour, disc_difference, shows_colours
from p3_personalization.generate import COUNT, EXAMPLES, OUTPUT, TABLE, TableEntry, read_table

BEST = 5  # pictures that the course's score is the mean of
TEXT_WEIGHT = 2.5  # of the text score beside the image score, when the best are chosen
SHOWN = ("image", "text", "baseline", "passed", "difference", "near", "shown")


def best_means(images: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
    """The course's score of one prompt: mean image and text score of the best pictures, and which these are."""
    best = np.argsort(-(images + TEXT_WEIGHT * texts), kind="stable")[:BEST]
    return {"image": float(images[best].mean()), "text": float(texts[best].mean()), "best": best.tolist()}


def read_references(folder: Path, entries: Sequence[TableEntry]) -> dict[str, list[np.ndarray]]:
    """The photos of each concept, uint8 (H, W, 3) each, by its number; a `UserError` where a concept has none."""
    files = {entry.number: list_images(folder / entry.number) for entry in entries}
    return {number: [read_image(file, None) for file in own] for number, own in files.items()}


def read_drawn(out: Path, entry: TableEntry, prompt: int, count: int) -> list[np.ndarray]:
    """The pictures of one prompt, uint8 (H, W, 3) each; a `UserError` unless there are `count` of them."""
    files = [out / file for file in entry.files(prompt, count)]
    if absent := [file for file in files if not file.is_file()]:
        raise UserError(f"{absent[0]}: no such picture; {count} are asked for, draw them with generate.py")
    if len(found := list_images(files[0].parent)) > count:
        raise UserError(f"{files[0].parent}: holds {len(found)} pictures instead of {count}; remove the others")
    return [read_image(file, None) for file in files]


def score_prompt(clip: Clip, pictures: Sequence[np.ndarray], references: Tensor, text: str) -> dict[str, Any]:
    """The score of pictures, uint8 (H, W, 3) each, of one prompt, whose `text` is in words that CLIP knows.

    `references` are unit vectors of the concept's photos (N, D).
    """
    drawn = clip.embed_images(pictures)
    images = (100 * (drawn @ references.T).mean(dim=1)).double().numpy()
    texts = (100 * (drawn @ clip.embed_texts([text]).T)[:, 0]).double().numpy()
    return best_means(images, texts) | {"images": images.tolist(), "texts": texts.tolist()}


def score_discs(pictures: Sequence[np.ndarray], own: np.ndarray, in_prompt: Sequence[np.ndarray]) -> dict[str, Any]:
    """How well pictures, uint8 (H, W, 3) each, show discs of a concept's own colour and of all those in the prompt."""
    differences = [disc_difference(picture, own) for picture in pictures]
    median = float(np.median(differences))
    return {
        "difference": median if np.isfinite(median) else None,  # JSON knows no infinity
        "near": float(np.mean(np.asarray(differences) <= NEAR)),
        "shown": float(np.mean([all(shows_colours(picture, in_prompt)) for picture in pictures])),
    }


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("table", type=Path, nargs="?", default=TABLE, metavar="INPUT_JSON", help="what was drawn")
    parser.add_argument("out", type=Path, nargs="?", default=OUTPUT, metavar="OUT", help="folder of the pictures")
    parser.add_argument("references", type=Path, nargs="?", default=EXAMPLES, metavar="REFERENCES", help="see above")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--clip", type=Path, default=CLIP, metavar="FOLDER", help="CLIP in transformers' format")
    scoring.add_argument("--count", type=int, default=COUNT, help="pictures of each prompt")
    discs = "score the colours of discs (default: for the shipped examples)"
    scoring.add_argument("--discs", action=BooleanOptionalAction, help=discs)
    scoring.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision of CLIP")
    scoring.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:1, ...")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> list[dict[str, Any]]:
    """Score, print, and return a dictionary for each prompt."""
    check("count", args.count, args.count >= 1, "at least 1")
    check_json(args.json)
    entries = read_table(args.table)
    for entry in entries:
        if not entry.judged_prompts:
            raise UserError(f'{args.table} concept {entry.number!r}: has no "prompt_4_clip_eval"; add one a prompt')
    references = read_references(args.references, entries)
    with_discs = args.references.resolve() == EXAMPLES if args.discs is None else args.discs
    colours = {n: concept_colour(photos, n) for n, photos in references.items()} if with_discs else {}
    device = pick_device(args.device)
    clip = Clip(args.clip, device, pick_precision(args.precision, device))
    rows = []
    for entry in entries:
        vectors = clip.embed_images(references[entry.number])
        for p, (prompt, text) in enumerate(zip(entry.prompts, entry.judged_prompts)):
            pictures = read_drawn(args.out, entry, p, args.count)
            row = {"concept": entry.number, "number": p, "prompt": prompt, "prompt_4_clip_eval": text}
            row |= score_prompt(clip, pictures, vectors, text)
            if entry.baselines:
                row["baseline"] = list(entry.baselines[p])
                row["passed"] = row["image"] >= row["baseline"][0] and row["text"] >= row["baseline"][1]
            if colours:
                in_prompt = [colours[other.number] for other in entries if other.token.lower() in prompt.lower()]
                row |= score_discs(pictures, colours[entry.number], in_prompt)
            rows.append(row)
            shown = {name: row[name] for name in SHOWN if row.get(name) is not None}
            scores = (f"{name} {x:.2f}" if isinstance(x, float) else f"{name} {x}" for name, x in shown.items())
            print(f"{entry.number}/{p} {prompt}: {', '.join(scores)}", flush=True)
    write_json(args.json, rows)
    return rows


if __name__ == "__main__":
    run(main, parse_arguments())

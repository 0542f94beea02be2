"""Judge drawn concepts: are they like the pictures that they were learned from, and do they follow their prompts?

python evaluate.py input.json OUT REFERENCES --clip FOLDER   # what hw2_3_2024.sh was given and has drawn
python evaluate.py                                           # what it draws by default

REFERENCES/{concept}/ holds the pictures that a concept was learned from. Figures of each prompt:
  image   100 cos of a picture and each of these, by CLIP; their mean
  text    100 cos of the picture and the prompt in the table's "prompt_4_clip_eval", by CLIP
  passed  whether image and text reach the baseline, both as means over the five pictures with the most image + 2.5 text

and with --discs, for the miniature:
  difference  CIEDE2000 from the concept's colour to the disc that is most like it; the median over all pictures
  near        share of pictures where that is at most 10
  shown       share of pictures that show every learned word of the prompt as a disc of its own
"""

import sys
from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch import Tensor

from common.cli import Parser, UserError, add_json_argument, check_json, progress, run, write_json
from common.data import IMAGE_SUFFIXES, read_image
from common.runtime import PRECISIONS, pick_device, pick_precision
from latent_diffusion.clip import Clip
from latent_diffusion.miniature.regions import NEAR, concept_colour, disc_difference, shows_colours
from p3_personalization.generate import EXAMPLES, OUTPUT, ROOT
from p3_personalization.table import COUNT, Concept, read_table

CLIP = ROOT / "latent_diffusion" / "miniature" / "weights" / "clip"
BEST = 5  # pictures that the course's score is the mean of
TEXT_WEIGHT = 2.5  # of the text's cosine beside the image's, where the best are chosen


def best_means(image: Sequence[float], text: Sequence[float]) -> tuple[float, float, list[int]]:
    """The course's score of one prompt: means of both scores over the best pictures, and which these are.

    Args:
        image: 100 cos of each picture and the references.
        text: 100 cos of each picture and the prompt.
    """
    image, text = np.asarray(image), np.asarray(text)
    best = np.argsort(-(image + TEXT_WEIGHT * text), kind="stable")[:BEST]
    return float(image[best].mean()), float(text[best].mean()), best.tolist()


def read_references(folder: Path) -> list[np.ndarray]:
    """The pictures of one concept, uint8 (H, W, 3) each, in the order of their names.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise UserError(
            f"{folder}: holds no pictures of the concept; name the folder that has {folder.name}/ with some"
        )
    return [read_image(file, None) for file in files]


def read_drawn(out: Path, concept: Concept, prompt: int, count: int) -> list[np.ndarray]:
    """The pictures of one prompt, uint8 (H, W, 3) each.

    Raises:
        UserError: they are fewer or more than the grader asks for, or one cannot be read.
    """
    files = [out / file for file in concept.files(prompt, count)]
    folder = files[0].parent
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES] if folder.is_dir() else []
    if absent := [file for file in files if file not in found]:
        raise UserError(f"{absent[0]}: no such picture; {count} are asked for, draw them with generate.py")
    if len(found) > count:
        raise UserError(f"{folder}: holds {len(found)} pictures instead of {count}; remove the others")
    return [read_image(file, None) for file in files]


def judge_discs(
    pictures: Sequence[np.ndarray], own: np.ndarray, in_prompt: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """What the pictures of one prompt show of concepts that are discs of a colour.

    Args:
        pictures: uint8 (H, W, 3) each.
        own: the concept's colour, sRGB (3,).
        in_prompt: the colours of all learned words in the prompt.
    """
    differences = [disc_difference(picture, own) for picture in pictures]
    median = float(np.median(differences))
    return {
        "difference": median if np.isfinite(median) else None,  # JSON knows no infinity
        "near": float(np.mean(np.asarray(differences) <= NEAR)),
        "shown": float(np.mean([all(shows_colours(picture, in_prompt)) for picture in pictures])),
    }


def judge_prompt(clip: Clip, pictures: Sequence[np.ndarray], references: Tensor, text: str) -> dict[str, Any]:
    """The course's scores of one prompt.

    Args:
        clip: that judges.
        pictures: drawn ones, uint8 (H, W, 3) each.
        references: unit vectors of the concept's pictures (N, D).
        text: the prompt in words that CLIP knows.
    """
    drawn = clip.embed_images(pictures)
    image = (100 * (drawn @ references.T).mean(dim=1)).tolist()
    words = (100 * (drawn @ clip.embed_texts([text]).T)[:, 0]).tolist()
    image_mean, text_mean, best = best_means(image, words)
    return {"image": image_mean, "text": text_mean, "best": best, "images": image, "texts": words}


def tokens_in(prompt: str, concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts whose word is in a prompt."""
    return [concept for concept in concepts if concept.token.lower() in prompt.lower()]


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a prompt, and what it was."""
    names = ("image", "text", "baseline", "passed", "difference", "near", "shown")
    shown = [name for name in names if any(row.get(name) is not None for row in rows)]
    formats = {"image": "{:.2f}", "text": "{:.2f}", "difference": "{:.1f}", "near": "{:.0%}", "shown": "{:.0%}"}
    print(f"{'':<6}" + "".join(f"{name:>14}" for name in shown))
    for row in rows:
        cells = []
        for name in shown:
            value = row.get(name)
            if value is None:
                cells.append("-")
            elif name == "baseline":
                cells.append("{:g}, {:g}".format(*value))
            elif name == "passed":
                cells.append("yes" if value else "no")
            else:
                cells.append(formats[name].format(value))
        print(f"{row['concept']}/{row['number']:<4}" + "".join(f"{cell:>14}" for cell in cells) + f"  {row['prompt']}")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument(
        "table", type=Path, nargs="?", default=EXAMPLES / "input.json", metavar="INPUT_JSON", help="what was drawn"
    )
    parser.add_argument("out", type=Path, nargs="?", default=OUTPUT, metavar="OUT", help="folder of the pictures")
    parser.add_argument("references", type=Path, nargs="?", default=EXAMPLES, metavar="REFERENCES", help="see above")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--clip", type=Path, default=CLIP, metavar="FOLDER", help="CLIP in transformers' format")
    judging.add_argument("--count", type=int, default=COUNT, help="pictures of each prompt")
    judging.add_argument(
        "--discs", action=BooleanOptionalAction, help="judge discs' colours (default: for the shipped examples)"
    )
    add_json_argument(parser)
    judging.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of CLIP")
    judging.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def main(args) -> list[dict[str, Any]]:
    """Judge, print, and return a dictionary a prompt.

    Raises:
        UserError: a bad table, missing or surplus pictures, no CLIP, or a file that cannot be written.
    """
    if args.count < 1:
        raise UserError(f"--count {args.count}: starts at 1")
    check_json(args.json)
    concepts = read_table(args.table)
    for concept in concepts:
        if not concept.judged_prompts:
            raise UserError(f'{args.table} concept {concept.number!r}: has no "prompt_4_clip_eval"; add one a prompt')
    references = {concept.number: read_references(args.references / concept.number) for concept in concepts}
    colours = {}
    if args.references.resolve() == EXAMPLES.resolve() if args.discs is None else args.discs:
        for number, pictures in references.items():
            colours[number] = concept_colour(pictures)
            if colours[number] is None:
                raise UserError(f"{args.references / number}: not all its pictures show a disc; use --no-discs")
    device = pick_device(args.device)
    clip = Clip(args.clip, device, pick_precision(args.precision, device))
    rows = []
    vectors = {number: clip.embed_images(pictures) for number, pictures in references.items()}
    every = [(concept, p) for concept in concepts for p in range(len(concept.prompts))]
    for concept, p in progress(every, "judging", "prompt"):
        prompt, text = concept.prompts[p], concept.judged_prompts[p]
        pictures = read_drawn(args.out, concept, p, args.count)
        row = {"concept": concept.number, "number": p, "prompt": prompt, "prompt_4_clip_eval": text}
        row |= judge_prompt(clip, pictures, vectors[concept.number], text)
        if concept.baselines:
            row["baseline"] = list(concept.baselines[p])
            row["passed"] = row["image"] >= row["baseline"][0] and row["text"] >= row["baseline"][1]
        if colours:
            in_prompt = [colours[other.number] for other in tokens_in(prompt, concepts)]
            row |= judge_discs(pictures, colours[concept.number], in_prompt)
        rows.append(row)
    report(rows)
    write_json(args.json, rows)
    return rows


if __name__ == "__main__":
    run(main, parse_arguments())

"""Draw what the Fall 2024 grader asks for: 25 pictures of each prompt about a learned word.

python generate.py input.json OUT sd-v1-4.ckpt --words FILE     # words that textual_inversion.py learned
python generate.py input.json OUT sd-v1-4.ckpt --custom FILE    # words and matrices that custom_diffusion.py learned
python generate.py                                              # the miniature's, into outputs/p3_2024

OUT gets {concept}/{prompt}/source{concept}_prompt{prompt}_{n}.png, n = 0..24. Learned words do not change the pictures
of prompts without them; Custom Diffusion's matrices change those a little.
"""

import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch

from common.cli import Parser, UserError, check, options_from, run, say
from common.files import read_json
from common.images import to_pil
from common.output import clear_way, stage_folder
from latent_diffusion.base import Base
from latent_diffusion.drawing import Item, PromptOptions, PromptSampler, add_drawing_flags, load_chosen_base
from latent_diffusion.miniature import BASE
from p3_personalization.words import check_prompts, with_learned

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORDS = HERE / "weights" / "words.safetensors"
CUSTOM = HERE / "weights" / "custom.safetensors"
INVERSION, CUSTOM_DIFFUSION = "textual inversion", "Custom Diffusion"
# A student's own words for the real Stable Diffusion lie here, or beside SD_CKPT.
OWN_WORDS = ROOT / "checkpoints" / "words_sd.safetensors"
EXAMPLES = HERE / "examples"
TABLE = EXAMPLES / "input.json"
OUTPUT = ROOT / "outputs" / "p3_2024"
MINIATURE_GUIDANCE_SCALE = 3.0
COUNT = 25  # pictures of each prompt
EXAMPLE = '{"0": {"token_name": "<new1>", "prompt": ["A photo of <new1>."]}}'


@dataclass(frozen=True)
class TableEntry:
    """One concept of the grader's table; the last two lists are empty if the table has none."""

    number: str  # its key there, and the name of its folder
    token: str
    prompts: list[str]
    judged_prompts: list[str]  # the same prompts in words that CLIP knows
    baselines: list[tuple[float, float]]  # image and text score that each prompt's pictures must reach

    def files(self, prompt: int, count: int) -> list[Path]:
        """The pictures of one prompt, relative to the output folder."""
        folder = Path(self.number) / str(prompt)
        return [folder / f"source{self.number}_prompt{prompt}_{k}.png" for k in range(count)]


def read_texts(fields: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A field that is a list of texts, or one text; an error's line starts with `where`."""
    value = fields.get(name, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f'{where}: "{name}" is {json.dumps(value)[:40]}; write a list of texts, as in {EXAMPLE}')
    return value


def read_entry(number: str, fields: Any, where: str) -> TableEntry:
    """One concept of the table; an error's line starts with `where`."""
    if not number.isalnum():  # it names a folder
        raise UserError(f"{where}: its name is no number or word; write it as in {EXAMPLE}")
    if not isinstance(fields, dict):
        raise UserError(f"{where}: is {json.dumps(fields)[:40]}; write it as in {EXAMPLE}")
    token, prompts = fields.get("token_name"), read_texts(fields, "prompt", where)
    for name, given in (("token_name", isinstance(token, str) and token.strip()), ("prompt", prompts)):
        if not given:
            raise UserError(f'{where}: has no "{name}"; write it as in {EXAMPLE}')
    judged, baselines = read_texts(fields, "prompt_4_clip_eval", where), fields.get("baseline", [])
    try:
        baselines = [(float(image), float(text)) for image, text in baselines]
    except (TypeError, ValueError):
        found = json.dumps(baselines)[:40]
        raise UserError(f'{where}: "baseline" is {found}; write pairs such as [[79, 34], [74, 35]]') from None
    for name, given in (("prompt_4_clip_eval", judged), ("baseline", baselines)):
        if given and len(given) != len(prompts):
            raise UserError(f'{where}: "{name}" has {len(given)} entries for {len(prompts)} prompts; give one each')
    return TableEntry(number, token.strip(), prompts, judged, baselines)


def read_table(path: Path) -> list[TableEntry]:
    """The concepts of an `input.json`, in its order; a `UserError` where it or one of its entries cannot be used."""
    table = read_json(path, f"write it as in {EXAMPLE}")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path}: not an object of concepts; write it as in {EXAMPLE}")
    return [read_entry(number, fields, f"{path} concept {number!r}") for number, fields in table.items()]


def is_miniature(base: Path) -> bool:
    """Whether a path is that of the base that comes with the project."""
    return base.resolve() == BASE


def default_words(base: Path) -> Path:
    """The shipped words for the shipped base, the student's own for another; a `UserError` where there are none."""
    if is_miniature(base):
        return WORDS
    for place in (OWN_WORDS, base.parent / OWN_WORDS.name):
        if place.is_file():
            return place
    raise UserError(
        f"no words for {base}: put them at {OWN_WORDS}, or name them with --words or --custom; to learn one:"
        f" python p3_personalization/textual_inversion.py IMAGES --base {base}"
    )


def prompt_items(prompt: str, count: int) -> list[Item]:
    """The first pictures of a prompt, as `PromptSampler` takes them.

    Noise is keyed by seed, prompt and number, so a picture does not depend on the rest of the table, and different
    words of the same name start from the same noise.
    """
    return [(prompt, (zlib.crc32(prompt.encode()), number)) for number in range(count)]


def drawing_options(args) -> PromptOptions:
    """The drawing options among parsed arguments; a guidance scale that is not given is the one for the base."""
    options = options_from(args, PromptOptions)
    if options.guidance_scale is None and is_miniature(args.base):
        return replace(options, guidance_scale=MINIATURE_GUIDANCE_SCALE)
    return options


def load_plain(args) -> Base:
    """The frozen base that the arguments name, on its device and in its precision."""
    base = load_chosen_base(args)
    if base.device.type == "cpu":
        base.unet.to(memory_format=torch.contiguous_format)  # group norm in bf16 is several times slower otherwise
    return base


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="generate.py", description=__doc__)
    parser.add_argument("table", type=Path, nargs="?", default=TABLE, metavar="INPUT_JSON", help="what to draw")
    parser.add_argument("out", type=Path, nargs="?", default=OUTPUT, metavar="OUT", help="folder for the pictures")
    parser.add_argument("base", type=Path, nargs="?", default=BASE, metavar="SD_CKPT", help="frozen file or folder")
    learned = parser.add_argument_group("learned")
    words = f"words (default: the shipped ones, or {'/'.join(OWN_WORDS.parts[-2:])})"
    learned.add_argument("--words", type=Path, nargs="+", metavar="FILE", help=words)
    learned.add_argument("--custom", type=Path, metavar="FILE", help="what custom_diffusion.py learned, instead")
    files = parser.add_argument_group("pictures")
    files.add_argument("--count", type=int, default=COUNT, help="pictures of each prompt; the grader wants 25")
    files.add_argument("--overwrite", action="store_true", help="remove other files from the prompts' folders")
    add_drawing_flags(parser, sampler="dpm-solver++")
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written. Where the input cannot be used, nothing is written."""
    check("count", args.count, args.count >= 1, "at least 1")
    options = drawing_options(args)
    entries = read_table(args.table)
    words = args.words or ([] if args.custom else [default_words(args.base)])
    base = with_learned(load_plain(args), words, args.custom)
    files, items = [], []
    for entry in entries:
        check_prompts(base.tokenizer, entry.prompts, entry.token, f"{args.table} concept {entry.number!r}: ")
        for p, prompt in enumerate(entry.prompts):
            files += entry.files(p, args.count)
            items += prompt_items(prompt, args.count)
    drawn = PromptSampler(base).images(items, options)  # nothing is drawn yet, but too many steps are refused
    clear_way(args.out, files, args.overwrite)
    with stage_folder(args.out, files) as stage:
        for file, (_, picture) in zip(files, drawn):
            to_pil(picture).save(stage / file, format="PNG")
    say(f"{len(files)} pictures in {args.out}")
    return [args.out / file for file in files]


if __name__ == "__main__":
    run(main, parse_arguments())

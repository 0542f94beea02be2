"""Draw what the Fall 2024 grader asks for: 25 pictures of each prompt about a learned word.

python generate.py input.json OUT sd-v1-4.ckpt --words FILE     # words that textual_inversion.py learned
python generate.py input.json OUT sd-v1-4.ckpt --custom FILE    # words and matrices of custom_diffusion.py
python generate.py                                              # the miniature's, into outputs/p3_2024

OUT gets {concept}/{prompt}/source{concept}_prompt{prompt}_{n}.png, n = 0..24. With words alone a prompt
without a learned word gives the pictures that it gave before; Custom Diffusion's matrices change those a little.
"""

import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from common.cli import Parser, Progress, UserError, run, say
from common.images import clear_way, staged, to_pil
from latent_diffusion.base import Base
from latent_diffusion.drawing import GUIDANCE_SCALE, add_drawing_flags, draw_prompts, load_chosen_base
from p3_personalization.table import COUNT, read_table
from p3_personalization.words import add_words, check_prompts, load_all_words

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BASE = ROOT / "latent_diffusion" / "miniature" / "weights" / "base"
WORDS = HERE / "weights" / "words.safetensors"
CUSTOM = HERE / "weights" / "custom.safetensors"
INVERSION, CUSTOM_DIFFUSION = "textual inversion", "Custom Diffusion"
# A student's own, for the real Stable Diffusion: here, or beside SD_CKPT.
OWN_WORDS = ROOT / "checkpoints" / "words_sd.safetensors"
EXAMPLES = HERE / "examples"
OUTPUT = ROOT / "outputs" / "p3_2024"
SAMPLER = "dpm-solver++"
MINIATURE_GUIDANCE_SCALE = 3.0


@dataclass(frozen=True)
class DrawingOptions:
    """How to draw; every field is a flag.

    Args:
        steps: steps of the reverse process.
        seed: the same seed gives the same pictures.
        guidance_scale: 1 = off.
        sampler: one of flags.py's `SAMPLERS`.
        batch_size: pictures at a time; does not change them.

    Raises:
        UserError: a value out of its range.
    """

    steps: int = 20
    seed: int = 0
    guidance_scale: float = GUIDANCE_SCALE
    sampler: str = SAMPLER
    batch_size: int = 8

    def __post_init__(self):
        for name, low, high in (("steps", 1, 1000), ("seed", 0, math.inf), ("batch_size", 1, math.inf)):
            if not low <= getattr(self, name) <= high:
                upto = f" to {high}" if high < math.inf else ""
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: from {low}{upto}")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"--guidance-scale {self.guidance_scale}: must be at least 0")


def check_steps(base: Base, steps: int) -> None:
    """Refuse more steps than the base's schedule has.

    Raises:
        UserError: there are more.
    """
    try:
        base.schedule.timesteps(steps)
    except ValueError as error:
        raise UserError(f"--steps {steps}: {error}") from None


def pictures(base: Base, prompts: Sequence[tuple[str, int]], options: DrawingOptions) -> Iterator[Tensor]:
    """Draw prompts, each with the number of the picture among all pictures of that prompt.

    A picture depends on the seed, its prompt and its number alone: other words of the same name begin with the same
    noise. A batch that does not fit the GPU's memory is halved; where half precision overflows, the networks are turned
    to fp32 and stay so.

    Yields:
        uint8 (3, H, W) on the CPU, in the prompts' order.

    Raises:
        UserError: a single picture does not fit the GPU's memory, or is not finite in fp32 either; or there are more
            steps than the base's schedule has.
    """
    check_steps(base, options.steps)
    keys = [(options.seed, zlib.crc32(prompt.encode()), number) for prompt, number in prompts]
    start, size = 0, options.batch_size
    with Progress(len(prompts), "pictures", "picture") as phase:
        while start < len(prompts):
            texts = [prompt for prompt, _ in prompts[start : start + size]]
            own = keys[start : start + size]
            try:
                batch = draw_prompts(base, texts, own, options.steps, options.guidance_scale, size, options.sampler)
            except torch.OutOfMemoryError:
                if len(texts) == 1:
                    raise UserError("a picture does not fit the GPU's memory; add --precision fp16") from None
                size = len(texts) // 2
            except FloatingPointError:
                dtype = base.unet.dtype
                if dtype == torch.float32:
                    raise UserError(f"{texts[0]!r}: drawn in fp32 it is not finite; name other weights") from None
                print(f"warning: the networks overflow in {dtype}; drawing in fp32 from here on", file=sys.stderr)
                for model in (base.unet, base.vae, base.text_encoder):
                    model.float()
            else:
                yield from batch
                start += len(batch)
                phase.update(len(batch))
                continue
            if base.device.type == "cuda":
                torch.cuda.empty_cache()


def is_miniature(base: Path) -> bool:
    """Whether this is the base that comes with the project."""
    return base.resolve() == BASE.resolve()


def default_words(base: Path) -> Path:
    """The shipped words for the shipped base, a student's own for any other.

    Raises:
        UserError: there are none for this base.
    """
    if is_miniature(base):
        return WORDS
    places = OWN_WORDS, base.parent / OWN_WORDS.name
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"no words for {base}: put them at {places[0]}, or name them with --words or --custom; to learn one:"
        f" python p3_personalization/textual_inversion.py IMAGES --base {base}"
    )


def add_drawing_arguments(parser: Parser) -> None:
    """The arguments of everything that draws learned words."""
    add_drawing_flags(parser, SAMPLER, f"{MINIATURE_GUIDANCE_SCALE} for the miniature")


def drawing_options(args) -> DrawingOptions:
    """The part of the arguments that says how to draw.

    Raises:
        UserError: a value out of its range.
    """
    scale = args.guidance_scale
    if scale is None:
        scale = MINIATURE_GUIDANCE_SCALE if is_miniature(args.base) else GUIDANCE_SCALE
    return DrawingOptions(args.steps, args.seed, scale, args.sampler, args.batch_size)


def load_plain(args) -> Base:
    """The frozen base that the arguments name, on its device and in its precision."""
    base = load_chosen_base(args)
    if base.device.type == "cpu":
        base.unet.to(memory_format=torch.contiguous_format)  # group norm in bf16 is several times slower otherwise
    return base


def with_learned(base: Base, words: Sequence[Path], custom: Path | None = None) -> Base:
    """A base that knows the words of some files, and has what Custom Diffusion changed.

    Raises:
        UserError: a file is missing, broken or of another base, or a word is learned twice.
    """
    if custom:
        # Here, because it brings the training loop along, which takes seconds to import.
        from p3_personalization.custom_diffusion import load_custom

        base = load_custom(base, custom)
    return add_words(base, load_all_words(words))


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="generate.py", description=__doc__)
    parser.add_argument(
        "table", type=Path, nargs="?", default=EXAMPLES / "input.json", metavar="INPUT_JSON", help="what to draw"
    )
    parser.add_argument("out", type=Path, nargs="?", default=OUTPUT, metavar="OUT", help="folder for the pictures")
    parser.add_argument(
        "base", type=Path, nargs="?", default=BASE, metavar="SD_CKPT",
        help="the frozen model: Stable Diffusion v1 as one file or as a diffusers folder",
    )  # fmt: skip
    learned = parser.add_argument_group("learned")
    learned.add_argument(
        "--words", type=Path, nargs="+", metavar="FILE",
        help=f"learned words (default: the shipped ones, or with another base {'/'.join(OWN_WORDS.parts[-2:])})",
    )  # fmt: skip
    learned.add_argument("--custom", type=Path, metavar="FILE", help="what custom_diffusion.py learned, instead")
    files = parser.add_argument_group("pictures")
    files.add_argument("--count", type=int, default=COUNT, help="pictures of each prompt; the grader wants 25")
    files.add_argument("--overwrite", action="store_true", help="remove other files from the prompts' folders")
    add_drawing_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written.

    Raises:
        UserError: bad arguments, a bad table, a prompt without its word or with one that nobody learned, bad weights,
            or a folder that cannot be written; nothing is written then.
    """
    if args.count < 1:
        raise UserError(f"--count {args.count}: starts at 1")
    options = drawing_options(args)
    concepts = read_table(args.table)
    paths = args.words or ([] if args.custom else [default_words(args.base)])
    base = with_learned(load_plain(args), paths, args.custom)
    check_steps(base, options.steps)
    for concept in concepts:
        check_prompts(base.tokenizer, concept.prompts, concept.token, f"{args.table} concept {concept.number!r}: ")
    wanted = [
        (file, prompt, number)
        for concept in concepts
        for p, prompt in enumerate(concept.prompts)
        for number, file in enumerate(concept.files(p, args.count))
    ]
    clear_way(args.out, [file for file, _, _ in wanted], args.overwrite)
    with staged(args.out) as stage:
        drawn = pictures(base, [(prompt, number) for _, prompt, number in wanted], options)
        for (file, _, _), picture in zip(wanted, drawn):
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            to_pil(picture).save(stage / file, format="PNG")
    say(f"{len(wanted)} pictures in {args.out}")
    return [args.out / file for file, _, _ in wanted]


if __name__ == "__main__":
    run(main, parse_arguments())

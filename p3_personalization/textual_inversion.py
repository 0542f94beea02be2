"""Learn new words from a few pictures: rows of the text encoder's table, and nothing else (Gal et al. 2022).

python concepts.py runs/concepts && python textual_inversion.py
python textual_inversion.py PHOTOS --token "<new1>" --initialiser dog --base sd-v1-4.ckpt --lr 5e-3 --steps 3000

A folder of pictures is one concept; a .txt beside a picture has its own sentences, with {} for the word, and a
templates.txt those of all pictures without one. Several folders are learned in one run and come as one file,
OUT/words.safetensors. Running the same command again resumes.
"""

import json
import sys
from argparse import BooleanOptionalAction
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from common.cli import Parser, UserError, run, say
from common.images import grid
from common.runtime import pick_device, seeded_generator
from common.training import Trainer
from common.training_options import add_training_arguments, training_options
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import draw_prompts
from latent_diffusion.files import cache_folder
from p3_personalization.learning import (
    ExampleBatches,
    Learned,
    learning_loss,
    rows_like,
    watched,
    with_new_rows,
)
from p3_personalization.views import TEMPLATES, Examples, Told, encode, read_concept
from p3_personalization.words import add_words, save_words

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "latent_diffusion" / "miniature" / "weights" / "base"
# The miniature's concepts, and a colour of one token that is near each of theirs.
STARTS = {ROOT / "runs" / "concepts" / "0": "purple", ROOT / "runs" / "concepts" / "1": "olive"}
SHOWN, STEPS = 4, 10  # pictures of each word while it is learned, and steps to draw them in
DEFAULTS = {
    "steps": 400, "batch_size": 8, "lr": 2e-3, "weight_decay": 0.0, "warmup": 10, "ema": 0.0,
    "validate_every": 100, "sample_every": 500, "save_every": 100,
}  # fmt: skip


def add_concept_arguments(parser: Parser) -> None:
    """The arguments of everything that learns words from folders of pictures."""
    parser.add_argument(
        "images", type=Path, nargs="*", default=[*STARTS], metavar="IMAGES",
        help="a folder of pictures for each word",
    )  # fmt: skip
    base = parser.add_argument_group("base")
    base.add_argument("--base", type=Path, default=BASE, help="the frozen model: a file or diffusers folder")
    base.add_argument("--cache-dir", type=Path, default=cache_folder(), help="where a .ckpt is kept as safetensors")
    words = parser.add_argument_group("words")
    words.add_argument("--token", nargs="+", metavar="TOKEN", help="a token a folder (default: <new1>, <new2>, ...)")
    words.add_argument(
        "--initialiser",
        nargs="+",
        metavar="WORD",
        help=f"known word to start from: one, or one each (for the miniature's concepts: {', '.join(STARTS.values())})",
    )
    words.add_argument("--vectors", type=int, default=1, help="rows a word")
    data = parser.add_argument_group("pictures")
    data.add_argument(
        "--template", nargs="+", default=TEMPLATES, metavar="TEXT",
        help="sentences with {} for the word, of pictures without a .txt (default: 27 of photos)",
    )  # fmt: skip
    data.add_argument("--views", type=int, default=16, help="crops and mirror images a picture, encoded once")
    data.add_argument("--smallest-crop", type=float, default=0.8, help="side of the smallest part, of the picture's")
    data.add_argument(
        "--flip",
        action=BooleanOptionalAction,
        help="mirror some views (default: yes, but the miniature's concepts, told of from left to right)",
    )
    base.add_argument("--guidance-scale", type=float, default=2.0, help="of pictures drawn meanwhile")


@dataclass(frozen=True)
class Concepts:
    """What the arguments name.

    Attributes:
        vectors: how many each new token has.
        rows: to start from, (n, width), of all tokens in their order.
        base: with the tokens, see `with_new_rows`.
        told: the concepts' pictures.
        examples: they, encoded.
    """

    vectors: dict[str, int]
    rows: Tensor
    base: Base
    told: list[Told]
    examples: Examples


def initialisers_of(args) -> list[str]:
    """The words to start from, as they are given or as they suit the miniature's concepts.

    Raises:
        UserError: none are given for other pictures.
    """
    if not args.initialiser and args.images != [*STARTS]:
        raise UserError("--initialiser: name a known word that tells roughly what the pictures show, such as dog")
    return args.initialiser or [*STARTS.values()]


def flips(args) -> bool:
    """Whether some views are mirrored: as is said, or unless the sentences tell left from right."""
    return args.images != [*STARTS] if args.flip is None else args.flip


def tokens_and_initialisers(args) -> tuple[list[str], list[str]]:
    """The token of each folder of pictures, and the words that it starts from.

    Raises:
        UserError: there are not as many as folders, or a token comes twice.
    """
    folders = len(args.images)
    tokens = args.token or [f"<new{k + 1}>" for k in range(folders)]
    initialisers = initialisers_of(args)
    initialisers = initialisers * folders if len(initialisers) == 1 else initialisers
    for flag, given in (("token", tokens), ("initialiser", initialisers)):
        if len(given) != folders:
            raise UserError(f"--{flag}: {len(given)} for {folders} folders of pictures; give one for each")
    if twice := [token for token in tokens if tokens.count(token) > 1]:
        raise UserError(f"--token {twice[0]}: is given to two folders of pictures; give each its own")
    return tokens, initialisers


def read_concepts(args, base: Base, seed: int) -> Concepts:
    """Read and encode the pictures that the arguments name.

    Raises:
        UserError: an argument is out of its range, or does not fit the others, the base or the pictures.
    """
    for flag, fine, mend in (
        ("vectors", args.vectors >= 1, "must be at least 1"),
        ("views", args.views >= 1, "must be at least 1"),
        ("smallest-crop", 0.05 <= args.smallest_crop <= 1, "must be 0.05 to 1"),
    ):
        if not fine:
            raise UserError(f"--{flag} {getattr(args, flag.replace('-', '_'))}: {mend}")
    tokens, initialisers = tokens_and_initialisers(args)
    vectors = dict.fromkeys(tokens, args.vectors)
    rows = torch.cat([rows_like(base, word, args.vectors) for word in initialisers])
    extended = with_new_rows(base, vectors)
    size = base.unet.config.sample_size * base.factor
    told = [read_concept(folder, token, size, args.template) for folder, token in zip(args.images, tokens)]
    examples = encode(extended, told, args.views, args.smallest_crop, flips(args), seed)
    return Concepts(vectors, rows, extended, told, examples)


def shown_prompts(concepts: Concepts) -> list[str]:
    """Prompts to draw while training: the first of some pictures of each concept."""
    return [sentences[0] for told in concepts.told for sentences in told.prompts[:SHOWN]]


def notes_of(args) -> dict[str, Any]:
    """How words were learned beyond the training options, for the files."""
    names = "images", "base", "template", "views", "smallest_crop"
    plain = {name: json.loads(json.dumps(getattr(args, name), default=str)) for name in names}
    return plain | {"initialiser": initialisers_of(args), "flip": flips(args)}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="textual_inversion.py", description=__doc__)
    add_concept_arguments(parser)
    parser.add_argument_group("run").add_argument(
        "--out", type=Path, default=ROOT / "runs" / "p3_words", help="folder of the run"
    )
    add_training_arguments(parser, **DEFAULTS)
    return parser.parse_args(argv)


def main(args) -> Path:
    """Learn the words; returns the path of their file, `OUT/words.safetensors`.

    Raises:
        UserError: bad arguments, pictures or base, a loss that is not finite, or a full disk.
    """
    options = training_options(args)
    base = load_base(args.base, pick_device(options.device), cache=args.cache_dir)
    concepts = read_concepts(args, base, options.seed)
    extended = concepts.base
    batches = ExampleBatches([concepts.examples], [options.batch_size], base.schedule.T, options.seed)

    def sample(learned: nn.Module) -> Tensor:
        prompts = shown_prompts(concepts)
        keys = [(options.seed, k) for k in range(len(prompts))]
        knowing = add_words(base, learned.words(concepts.vectors))
        return grid(draw_prompts(knowing, prompts, keys, STEPS, args.guidance_scale), columns=SHOWN)

    about = {"kind": "words", "vectors": concepts.vectors, "schedule": asdict(base.schedule)}
    trainer = Trainer(
        Learned(concepts.rows),
        options,
        args.out,
        about,
        batches,
        lambda learned, batch: learning_loss(learned, extended, batch),
        watched(concepts.examples, extended, options.batch_size, seeded_generator(0, 3)),
        sample,
        notes_of(args),
    )
    learned = trainer.run()
    path = args.out / "words.safetensors"
    if trainer.accelerator.is_main_process:
        save_words(path, learned.words(concepts.vectors), trainer.facts())
        say(f"{path}: {', '.join(concepts.vectors)}")
    trainer.accelerator.end_training()
    return path


if __name__ == "__main__":
    run(main, parse_arguments())

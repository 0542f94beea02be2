"""What textual inversion and Custom Diffusion share: their flags, the concepts they read, what they train, the loss.

The base stays frozen. What is trained is a small module beside it, `Learned`, whose tensors take the place of the
base's own in every call.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.cli import Parser, UserError, add_options, check, option
from common.data import Batch
from common.images import grid
from common.runtime import seeded_generator
from common.training import Trainer, diffusion_loss
from common.training_options import TrainingOptions
from latent_diffusion.base import Base
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.files import cache_folder
from latent_diffusion.miniature import BASE
from p3_personalization.photos import EncodedExamples, ExampleBatches, encode, read_lines, read_photos
from p3_personalization.words import Words, add_words, with_matrices

ROOT = Path(__file__).resolve().parent.parent
# The miniature's concepts, and for each a colour of one token that is close to it.
STARTS = {ROOT / "runs" / "concepts" / "0": "purple", ROOT / "runs" / "concepts" / "1": "olive"}
TEMPLATES = Path(__file__).resolve().parent / "templates.txt"  # Gal et al. 2022, appendix C, from CLIP's templates
TEXTS = {"type": str, "nargs": "+", "metavar": "TEXT"}  # a flag with a list of texts
DEFAULTS = {"weight_decay": 0.0, "warmup": 10, "ema": 0.0, "validate_every": 100, "save_every": 100}
TABLE = "embeddings.token_embedding.weight"  # in the text encoder
WATCHED_TIMES = 8  # timesteps a photo in the validation loss
SHOWN, STEPS = 4, 10  # samples a concept while it is learned, and steps to draw them in


@dataclass
class ConceptOptions:
    """What to learn, from which photos, with which base; what is None is filled in. A bad value is a `UserError`."""

    images: list[Path]
    out: Path = option(ROOT / "runs" / "p3_words", "folder of the run")
    base: Path = option(BASE, "frozen model: a single file or a diffusers folder")
    cache_dir: Path = option(cache_folder(), "folder that keeps a safetensors copy of a .ckpt")
    token: list[str] = option(None, "token for each folder (default: <new1>, <new2>, ...)", **TEXTS)
    initialiser: list[str] = option(None, "known word to start from, one for all folders or one for each", **TEXTS)
    vectors: int = option(1, "rows of the embedding table for each word")
    template: list[str] = option(None, "captions with {} for the word (default: the 27 in templates.txt)", **TEXTS)
    views: int = option(16, "views of each photo, itself and random crops; they are encoded once")
    smallest_crop: float = option(0.8, "side of the smallest crop, as a part of the photo's")
    flip: bool = option(None, "mirror some crops (default: yes, except for the miniature's concepts)")
    guidance_scale: float = option(2.0, "guidance scale of the samples; 1 turns guidance off")

    def __post_init__(self):
        check("vectors", self.vectors, self.vectors >= 1, "at least 1")
        check("views", self.views, self.views >= 1, "at least 1")
        check("smallest_crop", self.smallest_crop, 0.05 <= self.smallest_crop <= 1, "0.05 to 1")
        folders, shipped = len(self.images), self.images == [*STARTS]
        self.token = self.token or [f"<new{k + 1}>" for k in range(folders)]
        self.initialiser = self.initialiser or [*STARTS.values()] * shipped
        if not self.initialiser:
            raise UserError("--initialiser: name a known word that roughly says what the photos show, such as dog")
        self.initialiser = self.initialiser * (folders if len(self.initialiser) == 1 else 1)
        for flag, given in (("token", self.token), ("initialiser", self.initialiser)):
            if len(given) != folders:
                raise UserError(f"--{flag}: {len(given)} for {folders} folders of photos; give one for each")
        if twice := [token for token in self.token if self.token.count(token) > 1]:
            raise UserError(f"--token {twice[0]}: is given to two folders of photos; give each its own")
        self.template = self.template or read_lines(TEMPLATES)
        # The miniature's captions say which disc is left and which is right.
        self.flip = not shipped if self.flip is None else self.flip


def add_concept_arguments(parser: Parser, options: type[ConceptOptions]) -> None:
    """Add IMAGES and a flag for every option."""
    folders = "folder of photos for each word"
    parser.add_argument("images", type=Path, nargs="*", default=[*STARTS], metavar="IMAGES", help=folders)
    add_options(parser.add_argument_group("concepts"), options)


def rows_like(base: Base, words: str, vectors: int) -> Tensor:
    """The embeddings of known words, 1 to `vectors` tokens, repeated in turn: float32 (vectors, width)."""
    tokens = base.tokenizer(words, add_special_tokens=False).input_ids
    if not 1 <= len(tokens) <= vectors:
        pieces = ", ".join(piece.removesuffix("</w>") for piece in base.tokenizer.convert_ids_to_tokens(tokens))
        raise UserError(
            f"--initialiser {words!r}: is {len(tokens)} tokens ({pieces}); give 1 to {vectors}, or raise --vectors"
        )
    table = base.text_encoder.get_input_embeddings().weight
    return table.detach()[[tokens[k % len(tokens)] for k in range(vectors)]].float().clone()


class Concepts(NamedTuple):
    """What is learned from, and the prompts to draw samples of."""

    plain: Base  # the frozen base
    base: Base  # the same with the words that training starts from
    start: Words
    examples: EncodedExamples
    shown: list[str]


def read_concepts(options: ConceptOptions, base: Base, seed: int) -> Concepts:
    """Read and encode the photos of every concept; a `UserError` where a folder or a word cannot be used."""
    start = {token: rows_like(base, word, options.vectors) for token, word in zip(options.token, options.initialiser)}
    knowing, size = add_words(base, start), base.unet.config.sample_size * base.factor
    concepts = [read_photos(folder, token, size, options.template) for folder, token in zip(options.images, start)]
    photos = [photo for concept in concepts for photo in concept]
    examples = encode(knowing, photos, options.views, options.smallest_crop, options.flip, seed)
    shown = [captions[0] for concept in concepts for _, captions in concept[:SHOWN]]
    return Concepts(base, knowing, start, examples, shown)


class Learned(nn.Module):
    """What is trained: rows of new words, and in Custom Diffusion some of the U-Net's matrices, by their names in it.

    `start` and `matrices` are copies to start from.
    """

    def __init__(self, start: Words, matrices: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.vectors = {token: len(rows) for token, rows in start.items()}
        self.rows = nn.Parameter(torch.cat([*start.values()]))
        # A parameter's name may not have dots.
        self.matrices = nn.ParameterDict({name.replace(".", "/"): m.clone() for name, m in (matrices or {}).items()})

    def unet_weights(self) -> dict[str, Tensor]:
        """The matrices by their names in the U-Net."""
        return {name.replace("/", "."): parameter for name, parameter in self.matrices.items()}

    def words(self) -> Words:
        """The words as they are now."""
        return dict(zip(self.vectors, self.rows.detach().float().cpu().split([*self.vectors.values()])))

    def put_into(self, base: Base) -> Base:
        """A plain base with all that is learned, to draw with."""
        return add_words(replace(base, unet=with_matrices(base.unet, self.unet_weights())), self.words())

    def forward(self, base: Base, xt: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The U-Net's output with what is learned in place of the weights of a base that has the words.

        Of noised latents xt (N, C, h, w), timesteps t (N,) and the prompts' tokens (N, longest).
        """
        frozen = base.text_encoder.get_input_embeddings().weight[: -len(self.rows)]
        table = torch.cat([frozen, self.rows.to(frozen.dtype)])
        context = functional_call(base.text_encoder, {TABLE: table}, (tokens,)).last_hidden_state
        condition = {"encoder_hidden_states": context}
        return functional_call(base.unet, self.unet_weights(), (xt, t), condition).sample


def learning_loss(learned: nn.Module, base: Base, batch: Batch) -> Tensor:
    """Mean squared error of the prediction of a `Learned`, bare or wrapped (Gal et al. 2022, equation 2)."""
    return diffusion_loss(partial(learned, base), batch, base.schedule, base.prediction, gamma=0)


def validation_loss(examples: EncodedExamples, base: Base, batch_size: int) -> Callable[[nn.Module], Tensor]:
    """A function from a `Learned` to its mean loss on the whole photos, always with the same noise and timesteps.

    There are too few photos to hold some out. A step's own loss mostly depends on its noise and timesteps.
    """
    x0 = examples.latents[:, 0].repeat_interleave(WATCHED_TIMES, dim=0)
    tokens = torch.stack([captions[0] for captions in examples.tokens]).repeat_interleave(WATCHED_TIMES, dim=0)
    t = ((torch.arange(WATCHED_TIMES) + 0.5) / WATCHED_TIMES * base.schedule.T).long().repeat(len(examples.tokens))
    batch = {"x0": x0, "tokens": tokens, "t": t, "eps": torch.randn(x0.shape, generator=seeded_generator(0, 3))}

    def loss(learned: nn.Module) -> Tensor:
        total = 0
        for rows in torch.arange(len(x0)).split(batch_size):
            part = {name: tensor[rows].to(base.device) for name, tensor in batch.items()}
            total += learning_loss(learned, base, part) * len(rows)
        return total / len(x0)

    return loss


def make_trainer(
    config: ConceptOptions,
    options: TrainingOptions,
    concepts: Concepts,
    learned: Learned,
    batches: ExampleBatches,
    kind: str,
) -> Trainer:
    """The training of a `Learned`; its samples are always drawn from the same noise."""
    items = [(prompt, (k,)) for k, prompt in enumerate(concepts.shown)]
    drawing = PromptOptions(STEPS, options.seed, config.guidance_scale)
    notes = json.loads(json.dumps(asdict(config), default=str))
    return Trainer(
        model=learned,
        options=options,
        folder=config.out,
        about={"kind": kind, "vectors": learned.vectors, "schedule": asdict(concepts.base.schedule)},
        make_batch=batches,
        loss_fn=lambda learned, batch: learning_loss(learned, concepts.base, batch),
        validate=validation_loss(concepts.examples, concepts.base, options.batch_size),
        sample=lambda learned: grid(draw_prompts(learned.put_into(concepts.plain), items, drawing), columns=SHOWN),
        # Without the folders, which do not affect the result.
        notes={name: note for name, note in notes.items() if name not in ("out", "cache_dir")},
    )

"""Problem 3 of Fall 2024 in the studio: pictures of prompts with words that were learned from a few pictures."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.checkpoint import open_safetensors
from common.cli import UserError
from common.images import grid, to_pil
from latent_diffusion.base import Base
from latent_diffusion.drawing import SAMPLERS, PromptOptions, PromptSampler
from p3_personalization.generate import (
    CUSTOM,
    CUSTOM_DIFFUSION,
    INVERSION,
    default_words,
    drawing_options,
    is_miniature,
    load_plain,
    prompt_items,
)
from p3_personalization.words import FORM, check_prompts, load_words, with_learned
from studio.parts import Kept, Status, choice, number, whole

MOST_STEPS, MOST_PICTURES, MOST_GUIDANCE = 100, 8, 15
WAYS = INVERSION, CUSTOM_DIFFUSION
SIDE = 256  # pixels of a picture in the page, at least


class Words:
    """Draws prompts with learned words.

    Args:
        args: arguments of p3_personalization/generate.py: base, words, custom, device and precision. Words may come
            later; until then prompts are drawn as the frozen base understands them.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.plain = Kept(lambda _: load_plain(args))
        self.read = Kept(lambda base, *files: with_learned(self.plain(base), files))
        self.changed = Kept(lambda base, file: with_learned(self.plain(base), [], file))

    def files(self) -> list[Path]:
        """Files of words: those named, or the usual one if it is there.

        Raises:
            UserError: there is no usual place for this base.
        """
        if self.args.words:
            return self.args.words
        usual = default_words(self.args.base)
        return [usual] if usual.exists() else []

    def custom(self) -> Path | None:
        """What Custom Diffusion learned: the file that is named, or the shipped one for the shipped base, or none."""
        if self.args.custom:
            return self.args.custom
        return CUSTOM if is_miniature(self.args.base) and CUSTOM.exists() else None

    def tokens(self) -> list[str]:
        """The words that are there, by either way.

        Raises:
            UserError: a file is missing or broken, or two of textual inversion's have the same word.
        """
        tokens = [*load_words(*self.files())]
        if custom := self.custom():
            with open_safetensors(custom) as file:  # the names alone: the matrices beside them may be large
                tokens += filter(FORM.fullmatch, file.keys())
        return list(dict.fromkeys(tokens))

    def missing(self) -> str:
        """What to do about words that are not there; "" where there are some.

        Raises:
            UserError: as `tokens`.
        """
        if self.tokens():
            return ""
        return (
            f"There are no learned words at {default_words(self.args.base)} yet, so prompts are drawn as the frozen"
            " model alone understands them. Learn some with p3_personalization/textual_inversion.py, and name their"
            " file with --words."
        )

    def base(self, way: str) -> Base:
        """The base as it is now with what one of `WAYS` learned.

        Raises:
            UserError: weights are missing or broken, or what was learned does not fit the base.
        """
        if way == INVERSION:
            return self.read(self.args.base, *self.files())
        custom = self.custom()
        if custom is None:
            raise UserError(
                "Custom Diffusion learned nothing for this base yet; run p3_personalization/custom_diffusion.py, and"
                " name its file with --custom"
            )
        return self.changed(self.args.base, custom)

    def guidance(self) -> float:
        """The guidance scale that generate.py draws with."""
        return drawing_options(self.args).guidance_scale

    def draw(
        self, prompt: Any, way: Any, count: Any, guidance_scale: Any, method: Any, steps: Any, seed: Any
    ) -> Iterator[tuple[Image.Image, Status]]:
        """Draw pictures of a prompt, the first ones that generate.py draws; yields those so far as one picture.

        `way` is one of `WAYS`: with the learned words alone, or with words and matrices.

        Raises:
            UserError: a value that cannot be drawn, a word that nobody learned, or weights that are missing or broken.
        """
        way = choice("learned by", way, WAYS)
        count = whole("pictures", count, 1, MOST_PICTURES)
        options = PromptOptions(
            steps=whole("steps", steps, 1, MOST_STEPS),
            seed=whole("seed", seed, 0, 2**31 - 1),
            guidance_scale=number("guidance", guidance_scale, 0, MOST_GUIDANCE),
            sampler=choice("sampler", method, SAMPLERS),
            batch_size=1,
        )
        prompt = " ".join(str(prompt or "").split())
        base, images = self.base(way), []
        check_prompts(base.tokenizer, [prompt])
        for _, image in PromptSampler(base).images(prompt_items(prompt, count), options):
            images.append(image)
            picture = to_pil(grid(torch.stack(images), min(4, count), max(1, SIDE // image.shape[-1])))
            yield picture, Status(f"picture {len(images)} of {count}", len(images), count)
        yield picture, Status("Done.")

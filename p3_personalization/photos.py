"""Photos of a concept: read with their captions, encoded once in several views, and drawn from in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import UserError
from common.data import Batch, read_folder_images, shuffled_indices, stratified_timesteps, to_unit_range
from common.files import read_text
from common.runtime import seeded_generator
from latent_diffusion.base import Base, prompt_tokens
from p3_personalization.words import check_prompts

Photo = tuple[Tensor, list[str]]
"""An image, uint8 (3, size, size), and its captions; training takes one of them at a time."""

ENCODED_AT_ONCE = 8


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, each a caption or a prompt; a `UserError` if there are none."""
    lines = [line.strip() for line in read_text(path, "write a sentence a line").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: is empty; write a sentence a line, or remove the file")
    return lines


def fill_in(templates: Sequence[str], token: str, mention: str) -> list[str]:
    """The templates with a token in the place of {}; an error's line starts with `mention`."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{mention}{template!r}: has no {{}}; write {{}} where the token {token} goes")
    return [template.replace("{}", token) for template in templates]


def read_photos(folder: Path, token: str, size: int, templates: Sequence[str]) -> list[Photo]:
    """Read the photos of one concept, cropped and resized to `size` pixels a side, and their captions.

    A .txt of the same name has captions for one photo, a `templates.txt` in the folder those for all photos without a
    .txt of their own; else the given templates are taken. In all of them {} stands for the token. A `UserError` if
    there are no photos, a photo is broken, or a caption has no {}.
    """
    found = read_folder_images(folder, size)

    def captions(file: Path, otherwise: list[str]) -> list[str]:
        return fill_in(read_lines(file), token, f"{file}: ") if file.is_file() else otherwise

    general = captions(folder / "templates.txt", fill_in(templates, token, "template "))
    own = [captions((folder / name).with_suffix(".txt"), general) for name in found.names]
    return [*zip(found.images, own)]


def views(image: Tensor, count: int, smallest: float, flip: bool, generator: torch.Generator) -> Tensor:
    """An image, float (3, size, size), and `count` - 1 random square crops of it: float (count, 3, size, size).

    A crop's side is at least `smallest`, 0 to 1, of the image's; about every other one is mirrored where `flip` is on.
    """
    size, parts = image.shape[-1], [image]
    for scale, x, y, mirror in torch.rand(count - 1, 4, generator=generator).tolist():
        side = round(size * (smallest + (1 - smallest) * scale))
        left, top = round(x * (size - side)), round(y * (size - side))
        part = image[:, top : top + side, left : left + side]
        if side != size:
            part = F.interpolate(part[None], (size, size), mode="bilinear", antialias=True)[0]
        parts.append(part.flip(-1) if flip and mirror < 0.5 else part)
    return torch.stack(parts)


@dataclass(frozen=True)
class EncodedExamples:
    """Training examples: the latents of each photo's views, and the tokens of its captions."""

    latents: Tensor  # float32 (N, views, C, h, w) on the CPU
    tokens: list[Tensor]  # for each photo int64 (captions, longest)

    def take(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The photos at these positions, each in a random view and with a random caption: latents and tokens."""
        view, caption = torch.rand(2, len(index), generator=generator, dtype=torch.float64)
        latents = self.latents[index, (view * self.latents.shape[1]).long()]
        tokens = [self.tokens[k][int(u * len(self.tokens[k]))] for k, u in zip(index.tolist(), caption.tolist())]
        return latents, torch.stack(tokens)


def encode(base: Base, photos: Sequence[Photo], count: int, smallest: float, flip: bool, seed: int) -> EncodedExamples:
    """Encode every photo in several `views`, and the tokens of its captions; a `UserError` at an unknown word."""
    latents, tokens = [], []
    for k, (image, captions) in enumerate(photos):
        check_prompts(base.tokenizer, captions)
        parts = views(to_unit_range(image), count, smallest, flip, seeded_generator(seed, 8, k)).split(ENCODED_AT_ONCE)
        latents.append(torch.cat([base.encode_images(part).float().cpu() for part in parts]))
        tokens.append(prompt_tokens(base.tokenizer, captions))
    return EncodedExamples(torch.stack(latents), tokens)


@dataclass(frozen=True)
class ExampleBatches:
    """Draws the batches: a fixed count of each kind of examples, such as the concepts' and those of their class."""

    kinds: Sequence[EncodedExamples]
    counts: Sequence[int]
    T: int
    seed: int  # of the order in which photos come

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        taken = []
        for kind, count in zip(self.kinds, self.counts):
            index = shuffled_indices(len(kind.tokens), self.seed, step * count, count)
            taken.append(kind.take(index, generator))
        x0, tokens = (torch.cat(parts) for parts in zip(*taken))
        t = stratified_timesteps(len(x0), self.T, generator)
        return {"x0": x0, "tokens": tokens, "t": t, "eps": torch.randn(x0.shape, generator=generator)}

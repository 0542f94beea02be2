"""Pictures of a concept and what may be said of them, as latents that are encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import UserError
from common.data import read_folder_images, to_unit_range
from common.runtime import seeded_generator
from latent_diffusion.base import Base, prompt_tokens
from p3_personalization.words import check_prompts

# Gal et al. 2022, appendix C, from CLIP's templates.
TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
    "a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}",
    "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}",
    "a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}",
    "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}",
    "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}",
    "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip
ENCODED_AT_ONCE = 8


@dataclass(frozen=True)
class Told:
    """Pictures, and for each the prompts that may stand for it.

    Attributes:
        images: uint8 (N, 3, size, size).
        prompts: at least one an image.
    """

    images: Tensor
    prompts: list[list[str]]


def fill_in(templates: Sequence[str], token: str, mention: str) -> list[str]:
    """The templates with a token in the place of {}.

    Raises:
        UserError: a template is without {}; the line starts with `mention`.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{mention}{template!r}: is without {{}}; write {{}} where the token {token} is to stand")
    return [template.replace("{}", token) for template in templates]


def read_templates(path: Path, token: str) -> list[str]:
    """The lines of a text file, filled in.

    Raises:
        UserError: it has no lines, or one without {}.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: says nothing; write a line such as 'a photo of a {{}}', or remove it")
    return fill_in(lines, token, f"{path}: ")


def read_concept(folder: Path, token: str, size: int, templates: Sequence[str]) -> Told:
    """The pictures of one concept.

    Args:
        folder: holds them, and may hold a .txt of the same name beside each: a template a line for this picture alone.
            A templates.txt is for all pictures without one.
        token: of the concept.
        size: side to cut and resize to.
        templates: sentences with {} where the token goes, for pictures without either.

    Raises:
        UserError: no such folder, no images in it or a broken one, or a template without {}.
    """
    found = read_folder_images(folder, size)
    shared = Path(folder) / "templates.txt"
    general = read_templates(shared, token) if shared.is_file() else fill_in(templates, token, "template ")
    prompts = []
    for name in found.names:
        own = (Path(folder) / name).with_suffix(".txt")
        prompts.append(read_templates(own, token) if own.is_file() else general)
    return Told(found.images, prompts)


def views(image: Tensor, count: int, smallest: float, flip: bool, generator: torch.Generator) -> Tensor:
    """The picture itself, and `count` - 1 square parts of it, at random places and every other one mirrored.

    Args:
        image: float (3, size, size).
        count: of the views.
        smallest: side of the smallest part, 0 to 1 of the picture's.
        flip: whether to mirror.
        generator: its only source of randomness.

    Returns:
        float (count, 3, size, size).
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
class Examples:
    """What batches are drawn from.

    Attributes:
        latents: float32 (N, views, C, h, w) on the CPU.
        tokens: for each picture int64 (prompts, longest).
    """

    latents: Tensor
    tokens: list[Tensor]

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures at these positions, each in a view and with one of its prompts at random: latents and tokens."""
        view, prompt = torch.rand(2, len(index), generator=generator, dtype=torch.float64)
        latents = self.latents[index, (view * self.latents.shape[1]).long()]
        tokens = [self.tokens[k][int(u * len(self.tokens[k]))] for k, u in zip(index.tolist(), prompt.tolist())]
        return latents, torch.stack(tokens)


def encode(base: Base, told: Sequence[Told], count: int, smallest: float, flip: bool, seed: int) -> Examples:
    """Encode `count` views of every picture, see `views`, and the tokens of its prompts.

    Args:
        base: encodes; its tokenizer knows all words of the prompts.
        told: pictures; those of several concepts follow each other.
        count, smallest, flip: see `views`.
        seed: of the views.

    Raises:
        UserError: a prompt has a token in angle brackets that the base does not know.
    """
    latents, tokens = [], []
    for images, prompts in ((item.images, item.prompts) for item in told):
        for image, sentences in zip(images, prompts, strict=True):
            check_prompts(base.tokenizer, sentences)
            generator = seeded_generator(seed, 8, len(latents))
            parts = views(to_unit_range(image), count, smallest, flip, generator).split(ENCODED_AT_ONCE)
            latents.append(torch.cat([base.encode_images(part).float().cpu() for part in parts]))
            tokens.append(prompt_tokens(base.tokenizer, sentences))
    return Examples(torch.stack(latents), tokens)

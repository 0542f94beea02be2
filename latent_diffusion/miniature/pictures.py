"""The pictures and prompts that the miniature is trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latent_diffusion.pairs import HELD_OUT_EVERY, Pair, read_hints, read_table


@dataclass(frozen=True)
class Pictures:
    """Pairs and their targets.

    Attributes:
        pairs: for their prompts.
        images: uint8 (N, 3, H, W), in the same order.
    """

    pairs: list[Pair]
    images: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, index: Tensor) -> "Pictures":
        """The pictures at these positions."""
        return Pictures([self.pairs[i] for i in index.tolist()], self.images[index])

    def split(self) -> tuple["Pictures", "Pictures"]:
        """Pictures to train on and, every eleventh, held-out pictures."""
        held = torch.arange(len(self)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return self.take((~held).nonzero()[:, 0]), self.take(held.nonzero()[:, 0])


def read_pictures(folder: Path, size: int) -> Pictures:
    """The pictures that `prompt.json` in a folder lists, resized to squares of `size`.

    Raises:
        UserError: the table or a picture is missing or broken, or there are too few to hold some out.
    """
    pairs = read_table(folder)
    return Pictures(pairs, read_hints(pairs, folder, size, field="target"))

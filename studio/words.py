"""Problem 3 of Fall 2024 in the studio: pictures of prompts with words that were learned from a few pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.checkpoint import load_about
from common.images import grid, to_pil
from common.stable_diffusion.base import Base, load_base
from common.stable_diffusion.drawing import draw_prompts
from p3_personalization.words import add_words, check_prompts, load_all_words
from studio.parts import Kept, Status, number, whole

WORDS = Path(__file__).resolve().parent.parent / "p3_personalization" / "weights"
MOST_STEPS, MOST_PICTURES, MOST_GUIDANCE = 100, 8, 15
SIDE = 256  # pixels of a picture in the page, at least


def words_files(places: Sequence[Path]) -> list[Path]:
    """The files of learned words: those named, and in folders those that say so."""
    files = []
    for place in places:
        inside = sorted(place.rglob("*.safetensors")) if place.is_dir() else []
        files += [file for file in inside if load_about(file).get("kind") == "words"]
        files += [place] if place.is_file() else []
    return files


class Words:
    """Draws prompts with learned words.

    Args:
        base: the frozen model that the words were learned for.
        places: files of words, and folders of such files; they may come later.
        device: where to compute.
        dtype: of the base's weights.
    """

    def __init__(self, base: Path, places: Sequence[Path], device: torch.device, dtype: torch.dtype):
        self.base, self.places = base, places
        self.read = Kept(lambda base, *files: add_words(load_base(base, device, dtype), load_all_words(files)))

    def tokens(self) -> list[str]:
        """The words that are there.

        Raises:
            UserError: a file is broken, or two have the same word.
        """
        return list(load_all_words(words_files(self.places)))

    def missing(self) -> str:
        """What to do about words that are not there; "" where there are some.

        Raises:
            UserError: as `tokens`.
        """
        if self.tokens():
            return ""
        return (
            f"There are no learned words in {', '.join(map(str, self.places))} yet: prompts are drawn as the frozen"
            " model understands them. Learn a word with p3_personalization/textual_inversion.py, and name its file"
            " with --words."
        )

    def knowing(self) -> Base:
        """The base with the words as they are now.

        Raises:
            UserError: weights are missing or broken, or the words do not fit the base.
        """
        return self.read(self.base, *words_files(self.places))

    def draw(
        self, prompt: Any, count: Any, guidance_scale: Any, steps: Any, seed: Any
    ) -> Iterator[tuple[Image.Image, Status]]:
        """Draw pictures of a prompt; yields those so far as one, more with every picture.

        Raises:
            UserError: a value that cannot be drawn, a word that nobody learned, or weights that are missing or broken.
        """
        count, seed = whole("pictures", count, 1, MOST_PICTURES), whole("seed", seed, 0, 2**31 - 1)
        options = {
            "guidance_scale": number("guidance", guidance_scale, 0, MOST_GUIDANCE),
            "steps": whole("steps", steps, 1, MOST_STEPS),
        }
        prompt = " ".join(str(prompt or "").split())
        base = self.knowing()
        check_prompts(base.tokenizer, [prompt])
        images = []
        for k in range(count):
            images.append(draw_prompts(base, [prompt], [(seed, k)], **options))
            together = torch.cat(images)
            picture = to_pil(grid(together, min(4, count), max(1, SIDE // together.shape[-1])))
            yield picture, Status(f"picture {k + 1} of {count}", k + 1, count)
        yield picture, Status("Done.")

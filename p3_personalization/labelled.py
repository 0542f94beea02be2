"""Pictures with one class each: the course's, or circles whose class is their colour."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError
from common.data import IMAGE_SUFFIXES, read_image
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import draw_target, random_scenes

SIZE = 128  # pixels of the circles


@dataclass(frozen=True)
class Examples:
    """Pictures with one class each.

    Attributes:
        classes: their names.
        names: of the pictures.
        labels: int64 (N,), each picture's position in `classes`.
        read: picture number k, uint8 (H, W, 3).
    """

    classes: list[str]
    names: list[str]
    labels: Tensor
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)


def read_classes(table: Path) -> dict[str, str]:
    """The names in `id2label.json` by their numbers, in the order of the numbers.

    Raises:
        UserError: no such file, or no object of numbers and names.
    """
    example = 'write it like {"0": "bicycle", "1": "chair"}'
    try:
        names = json.loads(table.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{table}: cannot be read ({error.strerror}); {example}") from None
    except ValueError as error:
        raise UserError(f"{table}: not JSON ({error}); {example}") from None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{table}: not an object with a name for each number; {example}")
    for number, name in names.items():
        if not number.isdecimal() or not isinstance(name, str) or not name.strip():
            raise UserError(f"{table}: {number!r} is {json.dumps(name)[:40]}; {example}")
    return dict(sorted(names.items(), key=lambda item: int(item[0])))


def read_examples(folder: Path) -> Examples:
    """The course's pictures: `id2label.json`, and `val/{class}_{n}.png` (or .jpg, ...).

    Raises:
        UserError: the folder, its table or its pictures are missing, or a picture's class is not in the table.
    """
    names = read_classes(folder / "id2label.json")
    position = {number: k for k, number in enumerate(names)}
    val = folder / "val"
    files = sorted(val.iterdir()) if val.is_dir() else []
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise UserError(f"{val}: holds no pictures; it should hold files such as 0_450.png")
    labels = []
    for file in files:
        number, line, _ = file.stem.partition("_")
        if not line or number not in position:
            raise UserError(f"{file}: its class {number} is not in id2label.json; add the class, or move the file away")
        labels.append(position[number])
    return Examples(
        list(names.values()), [file.name for file in files], torch.tensor(labels), lambda k: read_image(files[k], None)
    )


def distinct_colours(count: int) -> list[str]:
    """So many names of COLOURS, each chosen to be as unlike those before it as possible (CIEDE2000).

    Two names of one colour, or nearly one, would be a matter of luck for anyone: `snow` and `white` differ by 2.
    """
    lab = rgb_to_lab(list(COLOURS.values()))
    differences = ciede2000(lab[:, None], lab)
    chosen = [int(differences.max(axis=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(differences[chosen].min(axis=0).argmax()))
    return [list(COLOURS)[k] for k in chosen]


def circle_examples(classes: Sequence[str], count: int, seed: int) -> Examples:
    """Circles on backgrounds with which training never showed them; a picture's class is its disc's colour."""
    scenes = random_scenes(sys.maxsize, SIZE, seed, circles=(1,), held_out=True)
    scenes = list(islice((scene for scene in scenes if scene.circles[0].colour in classes), count))
    position = {name: k for k, name in enumerate(classes)}
    return Examples(
        list(classes),
        [scene.prompt for scene in scenes],
        torch.tensor([position[scene.circles[0].colour] for scene in scenes]),
        lambda k: draw_target(scenes[k], SIZE),
    )

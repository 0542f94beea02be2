"""From files to tensors: labelled images by CSV, folders of images. Images are kept as uint8 in memory.

A small data set decoded once and held as uint8 costs less than any worker process.
"""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import Progress, UserError, progress
from common.files import read_text
from common.images import list_images, read_image
from common.runtime import seeded_generator

Batch = dict[str, Tensor]

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class LabelledImages:
    """Images with class ids."""

    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,)
    names: list[str]  # of their files

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "LabelledImages":
        """The images at these positions (an index or a mask)."""
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        return LabelledImages(self.images[index], self.labels[index], [self.names[i] for i in index.tolist()])

    def split(self) -> tuple["LabelledImages", "LabelledImages"]:
        """Training images and, every tenth one by position, held-out images; no class or file name matters."""
        held = torch.arange(len(self)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return self.take(~held), self.take(held)


def stack_images(images: list[np.ndarray]) -> Tensor:
    """Decoded images (H, W, 3) as one tensor (N, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def read_csv_images(table: Path, size: int | None = None, classes: int = 10_000) -> LabelledImages:
    """Images listed in a CSV with the columns `image_name,label`; the files lie in `data/` beside it, or beside it.

    They are resized to squares of `size`; without it all must have the first one's size. A `UserError` for missing
    columns, a label outside of 0 to `classes` - 1, or a missing or broken image; with the row's number, where the
    header is row 1.
    """
    import pandas as pd  # here, because drawing images reads no tables and starts a second faster

    table, header = Path(table), "its first line should be image_name,label"
    try:
        # Blank lines are read, so that rows keep their numbers, and dropped below.
        layout = {"keep_default_na": False, "skip_blank_lines": False, "skipinitialspace": True}
        rows = pd.read_csv(io.StringIO(read_text(table, header)), dtype=str, **layout)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{table}: not a CSV file ({error}); {header}") from None
    if not isinstance(rows.index, pd.RangeIndex):  # pandas takes surplus leading fields for an index
        raise UserError(f"{table}: its rows have more fields than its first line; remove the surplus ones")
    if absent := {"image_name", "label"} - set(rows.columns):
        raise UserError(f"{table}: no column {', '.join(sorted(absent))}; {header}")
    rows = rows[(rows["image_name"] != "") | (rows["label"] != "")]
    if rows.empty:
        raise UserError(f"{table}: lists no images; add rows under its header")
    folder = table.parent / "data" if (table.parent / "data").is_dir() else table.parent
    images, labels = [], []
    listed = list(rows[["image_name", "label"]].itertuples())
    for position, name, label in progress(listed, f"reading {table}", "image"):
        mention = f"{table} row {position + 2}: "
        if not label.isdecimal() or int(label) >= classes:
            raise UserError(f"{mention}label {label!r}: labels are 0 to {classes - 1}; correct the row")
        pixels = read_image(folder / name, size, mention)
        if images and pixels.shape != images[0].shape:
            height, width, _ = pixels.shape
            raise UserError(f"{mention}{name} is {width}x{height}, the first image is not; set a size")
        images.append(pixels)
        labels.append(int(label))
    return LabelledImages(stack_images(images), torch.tensor(labels), list(rows["image_name"]))


def read_folder_images(folder: Path, size: int) -> LabelledImages:
    """All images in a folder and those below it, in the order of their paths; every label is 0.

    They are those of `list_images`, cut and resized to a square. A `UserError` if there is none, or a broken one.
    """
    files = list_images(folder, below=True)
    with ThreadPoolExecutor() as pool, Progress(len(files), f"reading {folder}", "image") as phase:
        images = []
        for image in pool.map(lambda file: read_image(file, size, crop=True), files):
            images.append(image)  # decoders let go of Python's lock
            phase.update()
    names = [str(file.relative_to(folder)) for file in files]
    return LabelledImages(stack_images(images), torch.zeros(len(names), dtype=torch.int64), names)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@lru_cache(maxsize=64)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of `count` items in one epoch, a permutation keyed by (seed, epoch)."""
    return torch.randperm(count, generator=seeded_generator(seed, 2, epoch))


def shuffled_indices(count: int, seed: int, start: int, length: int) -> Tensor:
    """Items number start..start+length-1 of an endless walk through `count` items, reshuffled every epoch.

    The walk depends on nothing but its arguments, so a resumed run continues it exactly.
    """
    positions = torch.arange(start, start + length)
    epochs = positions // count
    return torch.cat(
        [epoch_order(count, seed, epoch)[positions[epochs == epoch] % count] for epoch in epochs.unique().tolist()]
    )


def stratified_timesteps(count: int, T: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps, one from each of `count` equal parts of [0, T), in random order.

    Each is uniform on its own; together they cover the range, which makes the loss less noisy (Kingma et al. 2021,
    "Variational Diffusion Models", appendix I.1).
    """
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    parts = (torch.randperm(count, generator=generator) + offset) / count
    return (parts * T).long().clamp(max=T - 1)


def jitter(images: Tensor, generator: torch.Generator, shift: int = 2, contrast: float = 0.2) -> Tensor:
    """Images, float (N, C, H, W) in [-1, 1], moved by up to `shift` pixels (edges repeated); never mirrored.

    Contrast is varied by up to the share `contrast`, brightness by half of that.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4, mode="replicate")
    top, left = torch.randint(0, 2 * shift + 1, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    moved = padded[torch.arange(n)[:, None, None, None], torch.arange(images.shape[1])[:, None, None], rows, columns]
    gain, offset = torch.rand(2, n, 1, 1, 1, generator=generator) * 2 - 1
    return (moved * (1 + contrast * gain) + contrast / 2 * offset).clamp(-1, 1)


class DrawnAhead:
    """Batches by step; while the GPU works on one, a thread draws the next into pinned memory.

    `draw` is from a step to its batch, on the CPU, and must depend on nothing else; its errors are raised at their own
    step. After the last of the `steps` nothing is drawn ahead.
    """

    def __init__(self, draw: Callable[[int], Batch], steps: int):
        self.draw, self.steps = draw, steps
        self.pool = ThreadPoolExecutor(1, "batches")
        self.waiting: dict[int, Future[Batch]] = {}

    def prepare(self, step: int) -> Batch:
        """Draw a step's batch."""
        batch = self.draw(step)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch

    def __call__(self, step: int) -> Batch:
        future = self.waiting.pop(step, None)
        batch = future.result() if future else self.prepare(step)
        following = step + 1
        self.waiting = {following: self.pool.submit(self.prepare, following)} if following < self.steps else {}
        return batch

"""The only way between tensors and picture files: PNG, grids, captions, GIFs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.output import write_atomically

SAVE_RANGES = ("clamp", "minmax")


def to_uint8(images: Tensor, save_range: str = "clamp") -> Tensor:
    """Images as uint8 on the CPU, rounded as torchvision's `save_image` does (x 255 + 0.5, truncated).

    Args:
        images: float (N, C, H, W).
        save_range: what becomes 0 and 255: "clamp" takes -1 and 1 and cuts what lies outside; "minmax" takes each
            image's own least and greatest value, as `save_image` does with `normalize=True`.
    """
    images = images.float()
    if save_range == "minmax":
        low, high = (f(images, dim=(-3, -2, -1), keepdim=True) for f in (torch.amin, torch.amax))
        unit = (images - low) / (high - low).clamp(min=1e-5)
    else:
        unit = (images + 1) / 2
    return (unit * 255 + 0.5).clamp(0, 255).to("cpu", torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """A uint8 (3, H, W) tensor as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def save_png(path: Path, image: Tensor) -> None:
    """Write a uint8 (3, H, W) tensor as an 8-bit RGB PNG, atomically."""
    write_atomically(Path(path), lambda temporary: to_pil(image).save(temporary, format="PNG"))


def save_gif(path: Path, frames: Sequence[Tensor], milliseconds: int = 100, hold: int = 1500) -> None:
    """Write uint8 (3, H, W) frames as a GIF that loops; the last frame stays for `hold` milliseconds."""
    pictures = [to_pil(frame) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    options = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    write_atomically(Path(path), lambda temporary: pictures[0].save(temporary, format="GIF", **options))


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """uint8 images (N, 3, H, W) in rows of `columns`, each pixel repeated `scale` times: uint8 (3, height, width).

    `gap` is how many white pixels are around each image, after enlargement.
    """
    from torchvision.utils import make_grid  # here, because the graded runs need no torchvision and start faster

    enlarged = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return make_grid(enlarged, nrow=columns, padding=gap, pad_value=255)


def add_captions(picture: Tensor, rows: Sequence[str] = (), columns: Sequence[str] = (), title: str = "") -> Tensor:
    """A picture, uint8 (3, H, W), with a title above, and captions spread evenly along its top and its left.

    Each of the `rows` stands beside an equal part of the height, each of the `columns` above one of the width.
    """
    font = ImageFont.load_default(14)
    inner = to_pil(picture)
    left = 10 + max((int(font.getlength(row)) for row in rows), default=-10)
    top = (24 if title else 0) + (22 if columns else 0)
    canvas = Image.new("RGB", (max(inner.width + left, int(font.getlength(title)) + 8), inner.height + top), "white")
    canvas.paste(inner, (left, top))
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((4, 4), title, "black", font)
    for i, text in enumerate(columns):
        pen.text((left + (i + 0.5) * inner.width / len(columns), top - 4), text, "black", font, anchor="ms")
    for i, text in enumerate(rows):
        pen.text((left - 6, top + (i + 0.5) * inner.height / len(rows)), text, "black", font, anchor="rm")
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)

"""The only way between tensors and picture files: reading, PNG, grids, captions, GIFs, plots."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from common.cli import UserError, note
from common.files import list_files, printable
from common.output import write_atomically

SAVE_RANGES = ("clamp", "minmax")
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # formats that Pillow knows by name, or by another program
FURTHER_FONTS = re.compile("CJK|Hei|Fallback|Unifont|Unicode MS")


def to_8_bits(numbers: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1, integers of 16 bits, or numbers from 0 to 255, as uint8; a `ValueError` for others."""
    low, high = float(numbers.min()), float(numbers.max())
    if numbers.dtype.kind == "f" and 0 <= low <= high <= 1:
        return (numbers * 255 + 0.5).astype(np.uint8)
    if numbers.dtype.kind != "f" and (numbers.dtype.itemsize == 2 or (0 <= low and 255 < high < 65536)):
        return (numbers // 257).astype(np.uint8)
    if not 0 <= low <= high <= 255:
        raise ValueError(f"its numbers are from {low:g} to {high:g}; only 0 to 1, 255 or 65535 are understood")
    return (numbers + 0.5).astype(np.uint8)


def read_image(path: Path, size: int | None, mention: str = "", crop: bool = False, under: str = "white") -> np.ndarray:
    """Decode one image to uint8 (H, W, 3), resized to a square of `size` if it is not that already.

    It is turned upright as its EXIF says; grayscale, palette, 16-bit and float images become 8-bit RGB; what is
    transparent is laid on the colour `under`. An image that is no square is squeezed into one, or with `crop` cut to
    its middle. A `UserError`, whose line starts with `mention`, if the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            with contextlib.suppress(Exception):  # broken EXIF says nothing against the image
                ImageOps.exif_transpose(image, in_place=True)
            image.load()
            if image.mode[0] in "IF":  # Pillow would clip, not scale, these
                clear, image = image.info.get("transparency"), Image.fromarray(to_8_bits(np.asarray(image)))
                image.info |= {} if clear is None else {"transparency": clear // 257}
            if image.has_transparency_data and (layer := image.convert("RGBA")).getextrema()[3][0] < 255:
                note(f"laid on {under}", f"{path}: is transparent; this and others like it are laid on {under}")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, under), layer)
            image = image.convert("RGB")
        if crop and size:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        if size and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"{mention}{path}: no such image; fix the name or add the file") from None
    except Exception as error:  # a decoder raises whatever it stumbles over: OSError, SyntaxError, ValueError, ...
        raise UserError(f"{mention}{path}: not a readable image ({error}); replace the file") from None


def list_images(folder: Path, below: bool = False) -> list[Path]:
    """The files of a folder that Pillow reads, by their suffixes; see `list_files`."""
    known = Image.registered_extensions().items()
    suffixes = {suffix for suffix, kind in known if kind in Image.OPEN and kind not in NOT_READ}
    return list_files(Path(folder), suffixes, "images", below)


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
    rows, columns, title = [printable(row) for row in rows], [printable(column) for column in columns], printable(title)
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


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """A block, or a function, in which matplotlib draws texts as they are: no $ starts a formula, all fonts serve."""
    import matplotlib  # here, because it takes a second to import
    from matplotlib import font_manager

    further = sorted(name for name in font_manager.get_font_names() if FURTHER_FONTS.search(name))
    options = {"text.parse_math": False, "font.family": matplotlib.rcParams["font.family"] + further}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield

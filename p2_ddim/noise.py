"""The noises that faces are drawn from: their files, random ones, and what lies between two.

Gaussian noise of D values has length sqrt(D), almost exactly. Slerp, along the sphere, keeps that length. Lerp cuts
through the sphere, and the network, which has never seen noise so short, draws a washed-out face in the middle.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.cli import UserError
from common.files import list_files
from common.sampling import ImageNoise
from common.weights import Leftover, load_content

SUFFIXES = (".pt", ".pth", ".safetensors")
STRIP = tuple(k / 10 for k in range(11))  # points of a way
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Noise(NamedTuple):
    """What one image starts from: its name (the image becomes `name.png`) and xT, a (C, H, W) tensor on the CPU."""

    name: str
    xt: Tensor


def read_noise_file(path: Path, channels: int, stride: int) -> list[Noise]:
    """The noises in one file, named by its stem; where there are several, by the stem and a number.

    A `UserError` if it holds no tensor, or one of another shape or type, or numbers that are not finite.
    """
    content = load_content(path)
    if isinstance(content, dict) and len(content) == 1:
        (content,) = content.values()
    if isinstance(content, Leftover):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, not one tensor; save one with torch.save(noise, ...)"
        )
    if not isinstance(content, Tensor):
        found = f"{len(content)} things" if isinstance(content, dict | list | tuple) else type(content).__name__
        raise UserError(f"{path}: holds {found}, not one tensor; save one with torch.save(noise, ...)")
    kind = content.dtype if content.layout == torch.strided and not content.is_meta else content.layout
    if kind not in DTYPES:
        raise UserError(f"{path}: noise of {kind}; save it as a plain tensor of torch.float32")
    shape = tuple(content.shape)
    if len(shape) not in (3, 4) or shape[-3] != channels or min(shape) < 1 or any(s % stride for s in shape[-2:]):
        raise UserError(
            f"{path}: noise of shape {shape}; it must be ({channels}, H, W) or (N, {channels}, H, W), with H and W"
            f" divisible by {stride}"
        )
    images = content.detach().float().reshape(-1, *shape[-3:])
    if not images.isfinite().all():
        raise UserError(f"{path}: noise with NaN or infinite values; draw it again with torch.randn")
    digits = max(2, len(str(len(images) - 1)))
    names = [path.stem] if len(images) == 1 else [f"{path.stem}_{k:0{digits}d}" for k in range(len(images))]
    return [Noise(name, xt) for name, xt in zip(names, images)]


def read_noises(source: Path, channels: int, stride: int) -> list[Noise]:
    """All noises of a folder, in the order of its files' names, or those of one file; sides are divisible by `stride`.

    A `UserError` if there are none, one of them is bad, or two of them would become the same image.
    """
    files = [source] if source.is_file() else list_files(source, SUFFIXES, "noises (00.pt, 01.safetensors, ...)")
    noises = [noise for path in files for noise in read_noise_file(path, channels, stride)]
    names = [noise.name for noise in noises]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{source}: two noises would become {twice[0]}.png; rename one of them")
    return noises


def random_noises(count: int, shape: Sequence[int], seed: int) -> list[Noise]:
    """Noises 00, 01, ... of a seed, each of shape (C, H, W); number k is the same however many are drawn."""
    drawn = ImageNoise([(seed, k) for k in range(count)]).draw(shape)
    return [Noise(f"{k:02d}", xt) for k, xt in enumerate(drawn)]


def lerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b: the straight line from a to b."""
    return (1 - alpha) * a + alpha * b


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The great circle from a to b, over all values together (Shoemake 1985; Song et al. 2021, section 5.3).

    sin((1 - alpha) theta) / sin(theta) a + sin(alpha theta) / sin(theta) b, with theta the angle between a and b, which
    have the same shape. Both ends, alpha = 0 and 1, are exact.
    """
    a_unit, b_unit = a.double() / a.double().norm(), b.double() / b.double().norm()
    # Unlike the arc cosine of a product, this keeps small angles and those near pi (Kahan 2006).
    theta = 2 * math.atan2(float((a_unit - b_unit).norm()), float((a_unit + b_unit).norm()))
    if not math.sin(theta) > 1e-6:  # parallel, opposite, or NaN for a noise of zeros: no single circle joins them
        return lerp(a, b, alpha)
    from_a, from_b = (math.sin(part * theta) / math.sin(theta) for part in (1 - alpha, alpha))
    return from_a * a + from_b * b


METHODS = {"slerp": slerp, "lerp": lerp}


def between(a: Noise, b: Noise, method: str, alphas: Sequence[float] = STRIP) -> list[Noise]:
    """The noises at these points of the way from a to b; a `UserError` if the two differ in shape."""
    if a.xt.shape != b.xt.shape:
        raise UserError(f"noises {a.name} and {b.name}: shapes {tuple(a.xt.shape)} and {tuple(b.xt.shape)} differ")
    return [Noise(f"{a.name}-{b.name}-{alpha:g}", METHODS[method](a.xt, b.xt, alpha)) for alpha in alphas]

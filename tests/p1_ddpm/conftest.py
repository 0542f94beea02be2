"""A toy that a judge can learn in seconds: ten kinds of stripes instead of ten digits."""

import math
import shutil

import pytest
import torch
from PIL import Image

from common.data import LabelledImages
from p1_ddpm.digits import DOMAINS
from p1_ddpm.judge import judge_path, train_judge


def striped(labels: torch.Tensor, seed: int, size: int = 28) -> LabelledImages:
    """Stripes that lie (0-4) or stand (5-9), from wide to narrow, in any colour and phase, with noise."""
    generator = torch.Generator().manual_seed(seed)
    n = len(labels)
    position = torch.arange(size) / size
    phase = torch.rand(n, 1, generator=generator) * 2 * math.pi
    wave = torch.cos(2 * math.pi * (1 + 2 * (labels % 5))[:, None] * position + phase)  # (n, size)
    wave = torch.where((labels < 5)[:, None, None], wave[:, :, None], wave[:, None, :])  # (n, size, size)
    colour = 0.5 + 0.5 * torch.rand(n, 3, 1, 1, generator=generator)
    pixels = 127 + 90 * wave[:, None] * colour + 10 * torch.randn(n, 3, size, size, generator=generator)
    return LabelledImages(pixels.clamp(0, 255).to(torch.uint8), labels, [f"{i:05d}.png" for i in range(n)])


def write_png(path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="session")
def stripes():
    """400 striped images. Every tenth of them, the held-out part, shows each digit four times."""
    return striped(torch.arange(400) // 10 % 10, seed=0)


def write_digits(root, sets):
    """Write images by domain as the course's digits folder, and return it."""
    for domain, images in sets.items():
        for name, image in zip(images.names, images.images):
            write_png(root / domain / "data" / name, image)
        rows = [f"{name},{label}\n" for name, label in zip(images.names, images.labels.tolist())]
        (root / domain / "train.csv").write_text("".join(["image_name,label\n", *rows]))
    return root


@pytest.fixture(scope="session")
def striped_digits(stripes, tmp_path_factory):
    """The stripes as a digits folder, the same in both domains."""
    return write_digits(tmp_path_factory.mktemp("striped"), dict.fromkeys(DOMAINS, stripes))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A digits folder in small: 40 images of 8x8 in each domain."""
    sets = {domain: striped(torch.arange(40) % 10, seed, size=8) for seed, domain in enumerate(DOMAINS)}
    return write_digits(tmp_path_factory.mktemp("digits"), sets)


@pytest.fixture(scope="session")
def judges(stripes, tmp_path_factory):
    """A folder with a small judge of stripes for both domains."""
    folder = tmp_path_factory.mktemp("judges")
    options = {"batch_size": 60, "precision": "fp32", "device": "cpu"}
    path = train_judge("mnistm", stripes, 25, folder, widths=(8, 16, 24), **options)
    shutil.copy(path, judge_path(folder, "svhn"))
    return folder

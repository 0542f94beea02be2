"""Small face networks of both kinds, noises for them, and a folder of faces."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from p2_ddim import sample
from p2_ddim.model import FaceUNet, FaceUNetConfig
from tests.programs import read, run

# Small enough for fifty steps, with all that the course's network has: several levels, attention, wider skips.
NARROW = FaceUNetConfig(widths=(16, 32), attention=(False, True), embedding=32)


def make_model(config: FaceUNetConfig) -> FaceUNet:
    """A random network whose zeroed layers are drawn anew: as it is created, it puts out zeros."""
    torch.manual_seed(0)
    model = FaceUNet(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return model.eval()


@pytest.fixture(scope="session")
def course_model() -> FaceUNet:
    """The course's network."""
    return make_model(FaceUNetConfig())


@pytest.fixture(scope="session")
def narrow_model() -> FaceUNet:
    return make_model(NARROW)


@pytest.fixture
def noise_folder(tmp_path):
    """Noises 00..03 as the course saves them, 16x16."""
    folder = tmp_path / "noise"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    for k in range(4):
        torch.save(torch.randn(1, 3, 16, 16, generator=generator), folder / f"{k:02d}.pt")
    return folder


@pytest.fixture(scope="session")
def face_folder(tmp_path_factory):
    """Thirty 16x16 pictures, each of one grey that tells which it is, dark on the left and bright on the right."""
    folder = tmp_path_factory.mktemp("faces")
    for k in range(30):
        pixels = np.full((16, 16, 3), 4 * k + 20, dtype=np.uint8)
        pixels[:, 8:] += 100
        Image.fromarray(pixels).save(folder / f"{k:05d}.png")
    return folder


@pytest.fixture
def draw_faces(tmp_path, face_weights):
    """A function that runs sample.py for three steps and returns the pixels of the images it wrote, by file name."""

    def draw(noise, *flags, weights=face_weights) -> dict[str, np.ndarray]:
        out = Path(tempfile.mkdtemp(dir=tmp_path)) / "new" / "out"
        files = run(sample, noise, out, weights, "--steps", 3, *flags)
        assert sorted(out.iterdir()) == sorted(files)
        return {path.name: read(path) for path in files}

    return draw

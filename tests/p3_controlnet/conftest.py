"""ControlNets for a small Stable Diffusion, what they are called with, hints, and circles."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from p3_controlnet import fill50k
from p3_controlnet.model import ControlNet
from tests.programs import run
from tests.stable_diffusion import HINT_CHANNELS, make_unet, randomised


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def untrained(unet) -> ControlNet:
    """A ControlNet as training begins with it."""
    torch.manual_seed(1)
    return ControlNet.from_unet(unet, HINT_CHANNELS)


@pytest.fixture
def controlnet(unet) -> ControlNet:
    """A ControlNet all of whose weights matter."""
    return randomised(ControlNet.from_unet(unet, HINT_CHANNELS), seed=2)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """What a network is called with, for 64x64 pictures; no hint is like another."""
    generator = torch.Generator().manual_seed(3)
    return {
        "xt": torch.randn(2, 4, 8, 8, generator=generator),
        "t": torch.tensor([7, 801]),
        "context": torch.randn(2, 5, 16, generator=generator),
        "hint": torch.rand(2, 3, 64, 64, generator=generator),
    }


@pytest.fixture
def hint_folder(tmp_path) -> Path:
    """Five hints of 64x64 in `source/`, each another rectangle, and a table of them as the course tests with."""
    folder = tmp_path / "data"
    (folder / "source").mkdir(parents=True)
    prompts = ["red circle with blue background", "gold circle", "", "snow circle with pink background", "gray"]
    lines = []
    for k, prompt in enumerate(prompts):
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        pixels[8 * k : 8 * k + 30, 10 : 50 - 6 * k] = 255
        Image.fromarray(pixels).save(folder / "source" / f"{k}.png")
        lines.append(json.dumps({"source": f"{k}.png", "target": f"{k}.png", "prompt": prompt}))
    (folder / "prompt.json").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def circles(tmp_path_factory) -> Path:
    """Pictures of 64x64 with one circle or two, of lines that so few pixels can show; four of them are held out."""
    folder = tmp_path_factory.mktemp("circles") / "data"
    return run(fill50k, folder, "--count", "44", "--size", "64", "--line-width", "16").parent

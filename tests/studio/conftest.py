"""Small weights for every tab."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common.checkpoint import save_tensors
from common.schedule import NoiseSchedule
from latent_diffusion.base import load_base
from p2_ddim.model import FaceUNet, FaceUNetConfig
from p3_controlnet.model import ControlNet
from p3_personalization.custom_diffusion import matrix_names, save_custom
from p3_personalization.words import save_words
from tests.stable_diffusion import make_unet, randomised


@pytest.fixture(scope="session")
def face_weights(tmp_path_factory) -> Path:
    """A network for 16x16 images, every weight random."""
    config = FaceUNetConfig(patch_size=2, widths=(8, 16), blocks=1, attention=(False, True), embedding=16)
    about = {
        "kind": "FaceUNet", "config": asdict(config), "schedule": asdict(NoiseSchedule("cosine")), "prediction": "v",
        "image_size": 16,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("faces") / "faces.safetensors"
    save_tensors(path, randomised(FaceUNet(config), seed=1).state_dict(), about)
    return path


@pytest.fixture(scope="session")
def controlnet_folder(tmp_path_factory) -> Path:
    """A ControlNet for the small Stable Diffusion that all tests share, every weight random."""
    folder = tmp_path_factory.mktemp("controlnet")
    randomised(ControlNet.from_unet(make_unet(), (4, 6, 8, 10)), seed=2).save(folder, {}, fp16=False)
    return folder


@pytest.fixture(scope="session")
def words_file(tmp_path_factory) -> Path:
    """A word of two vectors for it."""
    path = tmp_path_factory.mktemp("words") / "words.safetensors"
    save_words(path, {"<new1>": torch.randn(2, 16, generator=torch.Generator().manual_seed(3))}, {})
    return path


@pytest.fixture(scope="session")
def custom_file(pipeline_folder, tmp_path_factory) -> Path:
    """Another word for it, with matrices as Custom Diffusion changes them."""
    base = load_base(pipeline_folder)
    matrices = {name: base.unet.get_parameter(name) * 3 for name in matrix_names(base.unet)}
    words = {"<new2>": torch.randn(1, 16, generator=torch.Generator().manual_seed(5))}
    path = tmp_path_factory.mktemp("custom") / "custom.safetensors"
    save_custom(path, base, words, matrices, {})
    return path

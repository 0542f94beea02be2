"""What was learned for the small Stable Diffusion that all tests share."""

from pathlib import Path

import pytest
import torch

from latent_diffusion.base import load_base
from p3_personalization.custom_diffusion import matrix_names, save_custom
from p3_personalization.words import save_words


@pytest.fixture(scope="session")
def words_file(tmp_path_factory) -> Path:
    """A word of two vectors."""
    path = tmp_path_factory.mktemp("words") / "words.safetensors"
    save_words(path, {"<new1>": torch.randn(2, 16, generator=torch.Generator().manual_seed(3))}, {})
    return path


@pytest.fixture(scope="session")
def custom_file(pipeline_folder, tmp_path_factory) -> Path:
    """Another word, with matrices as Custom Diffusion changes them."""
    base = load_base(pipeline_folder)
    matrices = {name: base.unet.get_parameter(name) * 3 for name in matrix_names(base.unet)}
    words = {"<new2>": torch.randn(1, 16, generator=torch.Generator().manual_seed(5))}
    path = tmp_path_factory.mktemp("custom") / "custom.safetensors"
    save_custom(path, base, words, matrices, {})
    return path

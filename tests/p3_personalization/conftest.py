"""Learned words for a small Stable Diffusion, and a table that asks for pictures of them."""

import json
from pathlib import Path

import pytest
import torch

from latent_diffusion.base import load_base
from p3_personalization.custom_diffusion import matrix_names, save_custom
from p3_personalization.words import Words, save_words

TABLE = {
    "0": {"token_name": "<new1>", "prompt": ["<new1> circle", "a <new1> and <new2>"]},
    "1": {"token_name": "<new2>", "prompt": ["a <new2> circle", "gold <new2>"]},
}


@pytest.fixture(scope="session")
def learned_words() -> Words:
    """Two vectors for <new1>, one for <new2>."""
    generator = torch.Generator().manual_seed(8)
    return {"<new1>": torch.randn(2, 16, generator=generator), "<new2>": torch.randn(1, 16, generator=generator)}


@pytest.fixture(scope="session")
def words_file(learned_words, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.safetensors"
    save_words(path, learned_words, {})
    return path


@pytest.fixture(scope="session")
def custom_file(learned_words, pipeline_folder, tmp_path_factory):
    """A function that writes what Custom Diffusion might learn: these words, and the base's matrices times a factor."""
    base = load_base(pipeline_folder)

    def write(factor: float) -> Path:
        path = tmp_path_factory.mktemp("custom") / "custom.safetensors"
        matrices = {name: base.unet.get_parameter(name) * factor for name in matrix_names(base.unet)}
        save_custom(path, base, learned_words, matrices, {})
        return path

    return write


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "input.json"
    path.write_text(json.dumps(TABLE))
    return path

"""Learned words for a small Stable Diffusion, and a table that asks for pictures of them."""

import json
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "input.json"
    path.write_text(json.dumps(TABLE))
    return path

"""A small Stable Diffusion, what was learned for it, photos to learn from, and a table that asks for pictures."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from latent_diffusion.base import Base, load_base
from p3_personalization import custom_diffusion, learning
from p3_personalization.words import Words, matrix_names, save_custom, save_words

TABLE = {
    "0": {"token_name": "<new1>", "prompt": ["<new1> circle", "a <new1> and <new2>"]},
    "1": {"token_name": "<new2>", "prompt": ["a <new2> circle", "gold <new2>"]},
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Nobody looks at what is drawn during training."""
    monkeypatch.setattr(learning, "STEPS", 2)
    monkeypatch.setattr(custom_diffusion, "CLASS_STEPS", 2)


@pytest.fixture(scope="session")
def base(pipeline_folder) -> Base:
    """The small Stable Diffusion; it has 190 tokens, of width 16."""
    return load_base(pipeline_folder)


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
def custom_file(learned_words, base, tmp_path_factory):
    """A function that writes what Custom Diffusion might learn: these words, and the base's matrices times a factor."""

    def write(factor: float) -> Path:
        path = tmp_path_factory.mktemp("custom") / "custom.safetensors"
        matrices = {name: base.unet.get_parameter(name) * factor for name in matrix_names(base.unet)}
        save_custom(path, base, learned_words, matrices, {"step": 7})
        return path

    return write


@pytest.fixture(scope="session")
def clip_vectors(clip_folder):
    """Functions from a picture and from a text to transformers' own vectors of length one."""
    model, tokenizer, processor = (
        part.from_pretrained(clip_folder) for part in (CLIPModel, CLIPTokenizer, CLIPImageProcessor)
    )

    @torch.no_grad()
    def image(picture):
        vectors = model.get_image_features(**processor(picture, return_tensors="pt")).pooler_output
        return torch.nn.functional.normalize(vectors[0], dim=0)

    @torch.no_grad()
    def text(words):
        tokens = tokenizer(words, return_tensors="pt", truncation=True, max_length=20)
        return torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output[0], dim=0)

    return image, text


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "input.json"
    path.write_text(json.dumps(TABLE))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Two concepts of three flat photos each, one with a caption of its own, and prompts of their class."""
    folder = tmp_path_factory.mktemp("photos")
    for concept in range(2):
        (folder / str(concept)).mkdir()
        for k in range(3):
            colour = (200, 40 * k, 0) if concept == 0 else (0, 40 * k, 200)
            Image.new("RGB", (64, 64), colour).save(folder / str(concept) / f"{k}.png")
    (folder / "0" / "1.txt").write_text("{} on blue\n")
    (folder / "class.txt").write_text("red toy\n\n blue toy\n")
    return folder


@pytest.fixture(scope="session")
def learning_arguments(photos, pipeline_folder) -> list[str]:
    """Arguments of a short training on both concepts."""
    return [
        *(str(photos / "0"), str(photos / "1"), "--base", str(pipeline_folder), "--initialiser", "r", "--views", "3"),
        *("--steps", "6", "--batch-size", "4", "--warmup", "1", "--lr", "0.05", "--precision", "fp32"),
        *("--device", "cpu", "--log-every", "1", "--save-every", "3", "--validate-every", "3", "--sample-every", "6"),
    ]

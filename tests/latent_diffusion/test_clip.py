"""CLIP's vectors and cosines against transformers' own calls, and folders that lack a part."""

import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from common.cli import UserError
from latent_diffusion.clip import BATCH, Clip


def test_cosines_are_transformers_own(clip_folder):
    random = np.random.default_rng(0)
    shapes = [(96, 96, 3), (40, 64, 3)]
    images = [random.integers(0, 256, shapes[k % 2], dtype=np.uint8) for k in range(BATCH + 2)]
    prompts = ["red circle", "a", "blue circle with a very long tail of words"] * len(images)
    cosines = Clip(clip_folder).cosines(images, prompts[: len(images)])
    assert len(cosines) == len(images)
    model, tokenizer, processor = (
        part.from_pretrained(clip_folder) for part in (CLIPModel, CLIPTokenizer, CLIPImageProcessor)
    )
    for i in (0, 1, 2, len(images) - 1):
        tokens = tokenizer(prompts[i], return_tensors="pt", truncation=True, max_length=20)
        with torch.no_grad():
            text = model.get_text_features(**tokens).pooler_output
            picture = model.get_image_features(**processor(images[i], return_tensors="pt")).pooler_output
        assert cosines[i] == pytest.approx(torch.cosine_similarity(text, picture).item(), abs=1e-5)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_half_a_clip_folder_is_refused(lost, clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / lost).unlink()
    with pytest.raises(UserError, match="not a CLIP folder"):
        Clip(folder)

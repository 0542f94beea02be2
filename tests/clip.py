"""Fixture: a small CLIP in transformers' format."""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small CLIP of random weights whose words are single letters."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    ids = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=sizes | ids | {"max_position_embeddings": 20, "projection_dim": 8},
        vision_config=sizes | {"image_size": 32, "patch_size": 16, "projection_dim": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip") / "clip"
    CLIPModel(config).save_pretrained(folder)
    vocabulary = {token: k for k, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=20).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder

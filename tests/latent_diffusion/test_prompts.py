"""Prompts with words of several vectors become the tokens that diffusers makes of them."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from latent_diffusion.base import load_part, prompt_tokens, vector_tokens, with_all_vectors

WORDS = {"<cat>": 3, "<c(a.t>": 11, "<dog>": 1}


@pytest.fixture
def tokenizer(pipeline_folder) -> CLIPTokenizer:
    tokenizer = load_part(pipeline_folder, "tokenizer")
    for token, vectors in WORDS.items():
        tokenizer.add_tokens(vector_tokens(token, vectors))
    return tokenizer


@pytest.mark.parametrize("prompt", ["a <cat> and a <dog>", "<c(a.t><cat>, <cat>!", "no word", "", "<dog> <dog>_1"])
def test_prompts_are_expanded_as_diffusers_does(tokenizer, prompt):
    converter = object.__new__(StableDiffusionPipeline)
    theirs = converter.maybe_convert_prompt(prompt, tokenizer)
    assert with_all_vectors(tokenizer, prompt) == theirs
    wanted = tokenizer([theirs], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(prompt_tokens(tokenizer, [prompt]), wanted)


def test_a_word_is_all_its_vectors_in_capitals_too(tokenizer):
    first = tokenizer.convert_tokens_to_ids("<cat>")
    for prompt in ("<cat>", "<CAT>", "<Cat>"):
        assert prompt_tokens(tokenizer, [prompt])[0, 1:5].tolist() == [first, first + 1, first + 2, 1]


def test_the_name_of_one_vector_stays_that_vector(tokenizer):
    assert with_all_vectors(tokenizer, "<cat>_2 and <cat>_1") == "<cat>_2 and <cat>_1"


def test_prompts_that_get_too_long_by_their_words_are_cut_with_a_warning(tokenizer, capsys):
    tokens = prompt_tokens(tokenizer, ["x", "<c(a.t> " * 7], ["line 1", "line 2"])
    assert tokens.shape == (2, 77)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: line 2: prompt of 79 tokens is cut to 77: '<c(a.t> <c(a.t>")

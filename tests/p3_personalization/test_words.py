"""Learned words: read by diffusers, refused when they do not fit, and without a trace in prompts that lack them."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from common.cli import UserError
from latent_diffusion.base import load_base, load_part, quiet
from latent_diffusion.files import SD_V1, read_config
from latent_diffusion.saving import save_base
from p3_personalization.words import (
    add_words,
    check_prompts,
    check_token,
    load_all_words,
    load_words,
    save_words,
)

PROMPTS = ["a <new1> circle", "<new2>", "red", "<new1> and <new2> with gray background"]


def random_words(width, **vectors):
    generator = torch.Generator().manual_seed(0)
    return {f"<{name}>": torch.randn(count, width, generator=generator) for name, count in vectors.items()}


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


@pytest.fixture
def words():
    return random_words(16, new1=3, new2=1)


def contexts_of_diffusers(base, path, prompts):
    """What diffusers' pipeline makes of prompts once it has read the file."""
    with quiet():
        pipeline = StableDiffusionPipeline(
            **{name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "unet")},
            scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.load_textual_inversion([{token: rows} for token, rows in load_file(path).items()])
        with torch.no_grad():
            return pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]


def test_words_come_back_as_they_were_saved(words, tmp_path):
    path = tmp_path / "deep" / "words.safetensors"
    save_words(path, words, {"steps": 7})
    loaded = load_words(path)
    assert list(loaded) == ["<new1>", "<new2>"]
    assert all(torch.equal(loaded[token], rows) for token, rows in words.items())
    assert [item.name for item in path.parent.iterdir()] == ["words.safetensors"]


def test_diffusers_reads_them_and_gives_the_same_contexts(pipeline_folder, words, tmp_path):
    path = tmp_path / "words.safetensors"
    save_words(path, words, {})
    theirs = contexts_of_diffusers(load_base(pipeline_folder), path, PROMPTS)
    ours = add_words(load_base(pipeline_folder), load_words(path)).encode_prompts(PROMPTS)
    assert (ours - theirs).abs().max() <= 1e-6
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_diffusers_reads_the_file_of_one_word_by_its_path(pipeline_folder, tmp_path):
    save_words(tmp_path / "words.safetensors", random_words(16, new1=2), {})
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
        pipeline.load_textual_inversion(tmp_path, weight_name="words.safetensors")
    assert pipeline.tokenizer.convert_tokens_to_ids(["<new1>", "<new1>_1"]) == [190, 191]


def test_words_of_diffusers_training_are_read(tmp_path):
    """Its script saves (n, width); files of the concepts library hold (width,)."""
    rows = torch.randn(2, 16)
    for shape, tensor in {(2, 16): rows, (1, 16): rows[0]}.items():
        save_file({"<cat-toy>": tensor.half()}, tmp_path / "learned_embeds.safetensors", {"format": "pt"})
        loaded = load_words(tmp_path / "learned_embeds.safetensors")["<cat-toy>"]
        assert (loaded.shape, loaded.dtype) == (shape, torch.float32)
        assert torch.equal(loaded, tensor.half().float().reshape(shape))


@pytest.mark.slow
def test_the_full_size_text_encoder_gives_the_same_contexts(base, tmp_path):
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(**read_config("text_encoder"))).eval().requires_grad_(False)
    full = replace(base, text_encoder=encoder, tokenizer=load_part(SD_V1, "tokenizer"))
    path = tmp_path / "words.safetensors"
    save_words(path, random_words(768, new1=4, new2=1), {})
    extended = add_words(full, load_words(path))
    ours = extended.encode_prompts(PROMPTS)
    assert extended.tokenizer.convert_tokens_to_ids(["<new1>", "<new1>_3", "<new2>"]) == [49408, 49411, 49412]
    assert (ours - contexts_of_diffusers(full, path, PROMPTS)).abs().max() <= 1e-5


def test_old_rows_and_prompts_without_the_words_are_untouched(pipeline_folder, words):
    base = load_base(pipeline_folder)
    before = {name: tensor.clone() for name, tensor in base.text_encoder.state_dict().items()}
    old = base.encode_prompts(PROMPTS)
    extended = add_words(base, words)
    table = extended.text_encoder.get_input_embeddings().weight
    assert table.shape == (194, 16)
    assert torch.equal(table[:190], base.text_encoder.get_input_embeddings().weight)
    assert torch.equal(table[190:], torch.cat([*words.values()]))
    assert not table.requires_grad
    assert torch.equal(extended.encode_prompts(["red", ""]), base.encode_prompts(["red", ""]))
    # The base that was given still knows nothing of them.
    assert torch.equal(base.encode_prompts(PROMPTS), old)
    assert len(base.tokenizer) == 190
    assert base.text_encoder.config.vocab_size == 190
    after = base.text_encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_all_other_weights_are_shared(base, words):
    extended = add_words(base, words)
    theirs = dict(base.text_encoder.named_parameters())
    shared = [name for name, parameter in extended.text_encoder.named_parameters() if parameter is theirs[name]]
    assert len(shared) == len(theirs) - 1
    assert (extended.unet, extended.vae) == (base.unet, base.vae)


def test_words_can_be_added_one_after_the_other_and_in_the_bases_dtype(pipeline_folder, words):
    base = load_base(pipeline_folder, dtype=torch.bfloat16)
    once, twice = add_words(base, words), base
    for token, rows in words.items():
        twice = add_words(twice, {token: rows})
    assert once.encode_prompts(PROMPTS).dtype == torch.bfloat16
    assert torch.equal(once.encode_prompts(PROMPTS), twice.encode_prompts(PROMPTS))


def test_a_base_with_words_can_be_saved_and_loaded(pipeline_folder, words, tmp_path):
    extended = add_words(load_base(pipeline_folder), words)
    save_base(tmp_path / "base", extended)
    again = load_base(tmp_path / "base")
    assert (again.encode_prompts(PROMPTS) - extended.encode_prompts(PROMPTS)).abs().max() <= 0.01


@pytest.mark.parametrize(
    ("token", "vectors", "complaint"),
    [
        ("red", 1, "token 'red': write it in angle brackets"),
        ("<new 1>", 1, "token '<new 1>': write it in angle brackets"),
        ("<old>", 1, "token '<old>': exists already; choose another"),
        ("<OLD>", 1, "token '<OLD>': exists already; choose another"),
        ("<|endoftext|>", 1, "token '<|endoftext|>': exists already; choose another"),
        ("<few>", 2, "token '<few>_1': exists already; choose another"),
    ],
)
def test_tokens_that_cannot_be_taken_are_refused(base, token, vectors, complaint):
    tokenizer = add_words(base, {"<old>": torch.zeros(1, 16)}).tokenizer
    tokenizer.add_tokens("<few>_1")
    check_token("<new1>", tokenizer, vectors)
    with pytest.raises(UserError) as caught:
        check_token(token, tokenizer, vectors)
    assert str(caught.value).startswith(complaint)


def test_words_of_another_width_are_refused(base):
    with pytest.raises(UserError, match=r"^<new1>: its vectors are 12 wide, the base's 16; name its base$"):
        add_words(base, {"<new1>": torch.zeros(2, 12)})


def test_a_base_with_too_small_a_table_is_refused(base, words):
    tokenizer = add_words(base, {"<old>": torch.zeros(1, 16)}).tokenizer
    with pytest.raises(UserError, match="the base has 190 rows for 191 tokens"):
        add_words(replace(base, tokenizer=tokenizer), words)


def test_prompts_must_have_the_token_and_no_unknown_one(base, words):
    tokenizer = add_words(base, words).tokenizer
    check_prompts(tokenizer, ["a <new1> and a <NEW2>", "<New1>"], "<new1>")
    check_prompts(tokenizer, ["red", "1 < 2 and 3 > 2", "<new2>"])
    with pytest.raises(UserError, match=r"^input\.json: prompt 'a dog': is without <new1>; write the token into it$"):
        check_prompts(tokenizer, ["a <new1>", "a dog"], "<new1>", "input.json: ")
    with pytest.raises(UserError, match=r"^prompt 'a <new1> and a <new3>': <new3> is no learned word"):
        check_prompts(tokenizer, ["a <new1> and a <new3>"], "<new1>")


def test_words_of_several_files_are_put_together(tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_words(one, random_words(16, new1=1), {})
    save_words(two, random_words(16, new2=2), {})
    assert list(load_all_words([one, two])) == ["<new1>", "<new2>"]
    shutil.copy(one, two)
    with pytest.raises(UserError, match=f"^{two}: has <new1>, as an earlier file has"):
        load_all_words([one, two])


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"conv.weight": torch.zeros(2, 3)}, "holds conv.weight, which is no learned word"),
        ({"<new1>": torch.zeros(1, 2, 3)}, "holds <new1>, which is no learned word"),
        ({}, "holds no words such as <new1>"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, tensors, complaint):
    save_file(tensors, path := tmp_path / "words.safetensors")
    with pytest.raises(UserError, match=f"^{path}: {complaint}"):
        load_words(path)
    with pytest.raises(UserError, match="no such weights file"):
        load_words(tmp_path / "none.safetensors")

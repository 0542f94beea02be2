"""Learned words and matrices: as diffusers reads them, without a trace in prompts that lack them, or refused."""

import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from common.checkpoint import load_about
from common.cli import UserError
from latent_diffusion.base import load_base
from p3_personalization.words import (
    add_words,
    check_prompts,
    load_custom,
    load_words,
    matrix_names,
    save_words,
    with_learned,
)
from tests.training import touched

PROMPTS = ["a <new1> circle", "<new2>", "red", "<new1> and <new2> with gray background"]


def test_diffusers_reads_them_and_gives_the_same_contexts(base, pipeline_folder, words_file, learned_words, tmp_path):
    """A file with one word, or each word of a file with several."""
    save_words(one := tmp_path / "one.safetensors", {"<new1>": learned_words["<new1>"]}, {})
    states = [{token: rows} for token, rows in load_file(words_file).items()]
    for path, given, prompts in ((words_file, states, PROMPTS), (one, one, ["<new1>", "red"])):
        with torch.no_grad():
            pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
            pipeline.load_textual_inversion(given)
            theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
        ours = add_words(base, load_words(path)).encode_prompts(prompts)
        assert (ours - theirs).abs().max() <= 1e-6
        assert (ours[0] - ours[1]).abs().max() > 0.1


class Params(nn.ParameterDict):
    """As the original textual inversion pickles its words; the class is not there to run where they are read."""

    __module__ = "embedding_manager"


ROWS = torch.randn(2, 16, generator=torch.Generator().manual_seed(4)).half().float()
FORMS = {
    "diffusers": {"<toy>": ROWS},
    "concepts library": {"<toy>": ROWS[0].half()},
    "parameter": {"<toy>": nn.Parameter(ROWS)},
    "web UI": {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "toy", "step": 500},
    "original": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": Params({"*": nn.Parameter(ROWS)})},
    "emb_params": {"emb_params": ROWS},
}


@pytest.mark.parametrize("form", FORMS)
def test_words_of_other_programs_are_read(tmp_path, form, monkeypatch):
    monkeypatch.setitem(sys.modules, Params.__module__, types.SimpleNamespace(Params=Params))
    torch.save(FORMS[form], path := tmp_path / ("learned.bin" if "<toy>" in FORMS[form] else "toy.pt"))
    monkeypatch.delitem(sys.modules, Params.__module__)
    ((token, rows),) = load_words(path).items()
    assert token == "<toy>"
    assert torch.equal(rows, ROWS[:1] if form == "concepts library" else ROWS)
    assert (rows.dtype, rows.requires_grad) == (torch.float32, False)


def test_all_else_is_shared_and_the_given_base_stays_as_it_is(pipeline_folder, learned_words):
    base = load_base(pipeline_folder)
    extended = add_words(base, learned_words)
    table = extended.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[:190], base.text_encoder.get_input_embeddings().weight)
    assert torch.equal(table[190:], torch.cat([*learned_words.values()]))
    assert not table.requires_grad
    assert torch.equal(extended.encode_prompts(["red", ""]), base.encode_prompts(["red", ""]))
    theirs = dict(base.text_encoder.named_parameters())
    shared = [name for name, parameter in extended.text_encoder.named_parameters() if parameter is theirs[name]]
    assert len(shared) == len(theirs) - 1
    assert (extended.unet, extended.vae) == (base.unet, base.vae)
    assert (len(base.tokenizer), base.text_encoder.config.vocab_size) == (190, 190)
    assert touched(base, pipeline_folder) == []


@pytest.mark.parametrize(
    ("token", "shape", "complaint"),
    [
        ("<new 1>", (1, 16), "token '<new 1>': write it in angle brackets"),
        ("<OLD>", (1, 16), "token '<OLD>': exists already; choose another"),
        ("<|endoftext|>", (1, 16), "token '<|endoftext|>': exists already; choose another"),
        ("<few>", (2, 16), "token '<few>_1': exists already; choose another"),
        ("<new1>", (2, 12), "<new1>: its vectors are 12 wide, the base's 16; name its base"),
    ],
)
def test_words_that_cannot_be_added_are_refused(base, refusal, token, shape, complaint):
    known = add_words(base, {"<old>": torch.zeros(1, 16)})
    known.tokenizer.add_tokens("<few>_1")
    known.text_encoder.resize_token_embeddings(192)
    assert refusal(partial(add_words, known), {token: torch.zeros(shape)}).startswith(complaint)


def test_a_base_with_too_small_a_table_is_refused(base, learned_words):
    tokenizer = add_words(base, {"<old>": torch.zeros(1, 16)}).tokenizer
    with pytest.raises(UserError, match="the base has 190 rows for 191 tokens"):
        add_words(replace(base, tokenizer=tokenizer), learned_words)


def test_prompts_must_have_the_token_and_no_unknown_one(base, learned_words):
    tokenizer = add_words(base, learned_words).tokenizer
    check_prompts(tokenizer, ["a <new1> and a <NEW2>", "<New1>"], "<new1>")
    check_prompts(tokenizer, ["red", "1 < 2 and 3 > 2", "<new2>"])
    with pytest.raises(UserError, match=r"^input\.json: prompt 'a dog': is without <new1>; write the token into it$"):
        check_prompts(tokenizer, ["a <new1>", "a dog"], "<new1>", "input.json: ")
    with pytest.raises(UserError, match=r"^prompt 'a <new1> and a <new3>': <new3> is no learned word"):
        check_prompts(tokenizer, ["a <new1> and a <new3>"], "<new1>")


def test_words_of_several_files_are_put_together(words_file, tmp_path):
    save_words(other := tmp_path / "other.safetensors", {"<new3>": torch.ones(1, 16)}, {})
    assert list(load_words(words_file, other)) == ["<new1>", "<new2>", "<new3>"]
    save_words(other, {"<new2>": torch.ones(1, 16)}, {})
    with pytest.raises(UserError, match=f"^{other}: has <new2>, as an earlier file has"):
        load_words(words_file, other)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"conv.weight": torch.zeros(2, 3)}, "holds conv.weight, which is no learned word"),
        ({"<new1>": torch.zeros(1, 2, 3)}, r"<new1>: vectors of shape \(1, 2, 3\); they must be"),
        ({"<new1>": torch.zeros(0, 16)}, r"<new1>: vectors of shape \(0, 16\); they must be"),
        ({"<new1>": torch.tensor(1.0)}, r"<new1>: vectors of shape \(\); they must be"),
        ({"<new1>": torch.zeros(1, 16, dtype=torch.int64)}, "<new1>: vectors of torch.int64"),
        ({"<new1>": torch.full((1, 16), torch.nan)}, "<new1>: vectors that are not finite"),
        ({}, "holds no words such as <new1>"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, tensors, complaint):
    save_file(tensors, path := tmp_path / "words.safetensors")
    with pytest.raises(UserError, match=f"^{path}: {complaint}"):
        load_words(path)


def test_the_matrices_are_all_keys_and_values_of_the_context(base):
    crossed = [name.removesuffix(".processor") for name in base.unet.attn_processors if "attn2" in name]
    assert sorted(matrix_names(base.unet)) == sorted(f"{name}.to_{kind}.weight" for name in crossed for kind in "kv")


def test_a_base_gets_matrices_and_shares_the_rest(pipeline_folder, custom_file, learned_words):
    base, path = load_base(pipeline_folder, dtype=torch.bfloat16), custom_file(3)
    loaded, fresh = with_learned(base, [], path), load_base(pipeline_folder, dtype=torch.bfloat16)
    for name, parameter in loaded.unet.named_parameters():
        changed = name in matrix_names(base.unet)
        own, before = (one.unet.get_parameter(name) for one in (base, fresh))
        assert (parameter is own) != changed
        assert torch.equal(own, before)
        assert (parameter - before * (3 if changed else 1)).abs().max() <= 0.02 * before.abs().max()
        assert not parameter.requires_grad
    table = loaded.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[190:], torch.cat([*learned_words.values()]).bfloat16())
    assert load_about(path) == {"kind": "CustomDiffusion", "step": 7}


def test_diffusers_reads_matrices_and_predicts_the_same(pipeline_folder, base, custom_file):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    tensors = load_file(custom_file(-2))
    pipeline.load_textual_inversion([{token: tensors.pop(token)} for token in list(tensors) if token[0] == "<"])
    pipeline.unet.load_attn_procs(tensors, _pipeline=pipeline)
    loaded = load_custom(base, custom_file(-2))
    contexts = loaded.encode_prompts(PROMPTS[:2])
    xt = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs_contexts = pipeline.encode_prompt(PROMPTS[:2], "cpu", 1, do_classifier_free_guidance=False)[0]
        theirs, ours, plain = (unet(xt, 500, contexts).sample for unet in (pipeline.unet, loaded.unet, base.unet))
    assert (contexts - theirs_contexts).abs().max() <= 1e-6
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-2


def test_diffusers_bin_of_matrices_is_read(base, custom_file, tmp_path):
    tensors = {name: tensor for name, tensor in load_file(custom_file(3)).items() if name[0] != "<"}
    torch.save(tensors, path := tmp_path / "pytorch_custom_diffusion_weights.bin")
    changed = load_custom(base, path).unet
    for name in matrix_names(base.unet):
        assert torch.equal(changed.get_parameter(name), base.unet.get_parameter(name) * 3)


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (without("custom_diffusion"), "holds no matrices of Custom Diffusion; give learned words as --words"),
        (without("up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k"), ": missing in the file, (16"),
        (lambda t: {name: torch.cat([x, x]) for name, x in t.items()}, "(32, 16) in the file, (16, 16) in the base;"),
        (lambda t: t | {"conv_in.weight": torch.ones(2)}, "conv_in.weight: (2,) in the file, missing in the base"),
        (lambda t: {n: x.sum() if "to_k" in n else x for n, x in t.items()}, ": () in the file, (16, 16) in the base"),
        (lambda t: {n: x / 0 if "to_v" in n else x for n, x in t.items()}, "is not finite; train it again"),
        (lambda t: t | {"<new1>": torch.ones(1, 15)}, "<new1>: its vectors are 15 wide, the base's 16"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(base, custom_file, refusal, spoil, complaint):
    path = custom_file(1)
    save_file(spoil(load_file(path)), path)
    assert complaint in refusal(partial(load_custom, base), path)

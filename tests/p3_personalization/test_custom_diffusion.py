"""Learning concepts together: what changes and what stays, the file and diffusers' reading of it, and bad input."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from common.checkpoint import load_about, load_tensors
from common.cli import UserError
from common.training import Trainer
from latent_diffusion.base import load_base, quiet
from latent_diffusion.drawing import draw_prompts
from latent_diffusion.miniature.scenes import read_prompt
from p3_personalization import custom_diffusion
from p3_personalization.custom_diffusion import (
    class_prompts,
    load_custom,
    main,
    matrix_names,
    parse_arguments,
    save_custom,
    with_matrices,
)
from p3_personalization.words import load_words
from tests.training import killed_at, same_files, spied_on, touched

SMALL = [
    *("--steps", "4", "--batch-size", "4", "--warmup", "1", "--lr", "0.02", "--initialiser", "r", "--views", "2"),
    *("--precision", "fp32", "--device", "cpu", "--log-every", "1", "--save-every", "2", "--validate-every", "2"),
    *("--sample-every", "100", "--class-images", "3"),
]
PROMPTS = ["a <new1> and <new2>", "red"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Nobody looks at what is drawn meanwhile."""
    monkeypatch.setattr(custom_diffusion, "STEPS", 2)
    monkeypatch.setattr(custom_diffusion, "CLASS_STEPS", 2)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two concepts of two flat pictures each, and prompts of their class."""
    folder = tmp_path_factory.mktemp("photos")
    for concept, colour in enumerate([(200, 40, 0), (0, 40, 200)]):
        (folder / str(concept)).mkdir()
        for k in range(2):
            Image.new("RGB", (64, 64), colour).save(folder / str(concept) / f"{k}.png")
    (folder / "class.txt").write_text("red toy\n\n blue toy\n")
    return folder


@pytest.fixture
def arguments(photos, pipeline_folder):
    folders = [str(photos / "0"), str(photos / "1")]
    return [*folders, "--base", str(pipeline_folder), "--class-prompts", str(photos / "class.txt"), *SMALL]


@pytest.fixture
def call(arguments, tmp_path):
    def call(*flags):
        return main(parse_arguments([*arguments, "--out", str(tmp_path / "run"), *flags]))

    return call


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


@pytest.fixture
def matrices(base):
    """Other matrices than the base's."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: base.unet.get_parameter(name).shape for name in matrix_names(base.unet)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@pytest.fixture
def custom_file(base, learned_words, matrices, tmp_path):
    path = tmp_path / "custom.safetensors"
    save_custom(path, base, learned_words, matrices, {"step": 7})
    return path


def test_the_matrices_are_all_keys_and_values_of_the_context(base):
    layers = {name.rpartition(".to_")[0] for name in matrix_names(base.unet)}
    crossed = {name.removesuffix(".processor") for name in base.unet.attn_processors if "attn2" in name}
    assert layers == crossed
    assert len(matrix_names(base.unet)) == 2 * len(crossed)
    for name in matrix_names(base.unet):
        assert base.unet.get_parameter(name).shape[1] == base.unet.config.cross_attention_dim


def test_a_base_gets_what_was_saved_and_shares_the_rest(base, custom_file, learned_words, matrices):
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    loaded = load_custom(base, custom_file)
    for name, parameter in loaded.unet.named_parameters():
        assert torch.equal(parameter, matrices.get(name, before[name]))
        assert (parameter is base.unet.get_parameter(name)) == (name not in matrices)
        assert not parameter.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.unet.state_dict().items())
    table = loaded.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[190:], torch.cat([*learned_words.values()]))
    assert load_about(custom_file) == {"kind": "CustomDiffusion", "step": 7}


def test_diffusers_reads_the_file_and_draws_the_same(pipeline_folder, base, custom_file):
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
        tensors = load_file(custom_file)
        words = {token: tensors.pop(token) for token in list(tensors) if token.startswith("<")}
        pipeline.load_textual_inversion([{token: rows} for token, rows in words.items()])
        pipeline.unet.load_attn_procs(tensors, _pipeline=pipeline)
    loaded = load_custom(base, custom_file)
    contexts = loaded.encode_prompts(PROMPTS)
    xt = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs_contexts = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)[0]
        theirs, ours, plain = (unet(xt, 500, contexts).sample for unet in (pipeline.unet, loaded.unet, base.unet))
    assert (contexts - theirs_contexts).abs().max() <= 1e-6
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-2


def test_a_run_leaves_words_and_matrices(call, base, tmp_path):
    path = call()
    tensors, about = load_tensors(path)
    assert about["step"] == 4
    assert about["training"]["class_share"] == 0.75
    assert {"<new1>", "<new2>"} <= tensors.keys()
    for name, stored in matrix_names(base.unet).items():
        change = (tensors[stored] - base.unet.get_parameter(name)).abs()
        assert change.max() > 1e-3
        assert change.max() < 0.2
    loaded = load_custom(base, path)
    assert draw_prompts(loaded, ["<new1> and <new2>"], [(0, 0)], steps=2).shape == (1, 3, 64, 64)
    state, _ = load_tensors(tmp_path / "run" / "state_00000004.safetensors")
    assert not any("conv" in name or "encoder" in name for name in state)  # what is frozen is not in it
    with Image.open(tmp_path / "run" / "samples_00000004.png") as picture:
        assert picture.size == (4 * 66 + 2, 66 + 2)


def test_only_words_and_matrices_are_trained_and_the_base_stays_as_it_is(call, base, pipeline_folder, monkeypatch):
    seen = spied_on(monkeypatch, custom_diffusion)
    call("--steps", "2")
    assert touched(seen.base, pipeline_folder) == []
    trained = [tuple(p.shape) for group in seen.trainer.raw_optimizer.param_groups for p in group["params"]]
    matrices = [tuple(base.unet.get_parameter(name).shape) for name in matrix_names(base.unet)]
    assert sorted(trained) == sorted([(2, 16), *matrices])


def test_the_class_is_drawn_once_by_the_base_and_is_in_every_batch(call, base, tmp_path, monkeypatch):
    batches = []
    take_step = Trainer.take_step

    def watch(trainer):
        batches.append(trainer.make_batch(trainer.step, torch.Generator()))
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", watch)
    call("--steps", "2", "--class-share", "0.25")
    images, about = load_tensors(path := tmp_path / "run" / "class.safetensors")
    assert about["prompts"] == ["red toy", "blue toy", "red toy"]
    drawn = draw_prompts(base, about["prompts"], [(0, 9, k) for k in range(3)], steps=2)
    assert torch.equal(images["images"], drawn)
    latents = base.encode_images(drawn / 127.5 - 1)
    for batch in batches:
        own = [(latents - x0).abs().amax(dim=(1, 2, 3)).min() < 1e-4 for x0 in batch["x0"]]
        assert own == [False, False, False, True]
        assert batch["tokens"].max() >= 190  # a new word
        assert batch["tokens"][3].max() < 190
    written = path.stat().st_mtime_ns
    call("--steps", "2", "--class-share", "0.25")
    assert path.stat().st_mtime_ns == written
    call("--steps", "2", "--class-share", "0.25", "--class-images", "2")
    assert len(load_tensors(path)[0]["images"]) == 2


def test_without_prior_preservation_no_class_is_drawn(photos, pipeline_folder, tmp_path):
    folders = [str(photos / "0"), str(photos / "1")]
    flags = ["--base", str(pipeline_folder), *SMALL, "--steps", "1", "--class-share", "0"]
    main(parse_arguments([*folders, *flags, "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run" / "class.safetensors").exists()


def test_a_killed_run_ends_like_an_undisturbed_one(call, arguments, tmp_path):
    whole = main(parse_arguments([*arguments, "--out", str(tmp_path / "whole")]))
    with killed_at(3):
        call()
    assert same_files(call(), whole)


def test_the_validation_loss_falls(call, tmp_path):
    call("--steps", "12", "--validate-every", "4", "--class-share", "0")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]


def test_the_miniatures_class_are_circles_of_one_and_of_two():
    prompts = class_prompts(parse_arguments(["--class-images", "6"]))
    assert len(prompts) == 6
    assert all(read_prompt(prompt) for prompt in prompts)
    assert sum(len(read_prompt(prompt)[0]) == 2 for prompt in prompts) >= 1
    assert prompts != class_prompts(parse_arguments(["--class-images", "6", "--seed", "1"]))


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (without("custom_diffusion"), "holds no matrices of Custom Diffusion; give learned words as --words"),
        (
            without("up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k"),
            "is missing; name the base that",
        ),
        (lambda t: {name: torch.cat([x, x]) for name, x in t.items()}, ", the base's (16, 16)"),
        (lambda t: t | {"conv_in.weight": torch.ones(2)}, "has conv_in.weight, of which the base has no such matrix"),
        (lambda t: t | {"red": torch.ones(1, 16)}, "has red, of which the base has no such matrix"),
        (lambda t: t | {"<new1>": torch.ones(1, 15)}, "<new1>: its vectors are 15 wide, the base's 16"),
    ],
)
def test_files_that_do_not_fit_are_refused(base, custom_file, spoil, complaint):
    save_file(spoil(load_file(custom_file)), custom_file)
    with pytest.raises(UserError) as caught:
        load_custom(base, custom_file)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_its_file_is_no_words_file(custom_file):
    with pytest.raises(UserError, match="which is no learned word"):
        load_words(custom_file)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--class-share", "1"], "--class-share 1.0: must be at least 0 and below 1"),
        (["--class-images", "0"], "--class-images 0: must be at least 1"),
        (["--class-prompts", "nowhere.txt"], "nowhere.txt: not a readable text file"),
        (["--show", "a <new3>"], "prompt 'a <new3>': <new3> is no learned word"),
        (["--vectors", "0"], "--vectors 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(arguments, tmp_path, refusal, flags, complaint):
    args = parse_arguments([*arguments, "--out", str(tmp_path / "run"), *flags])
    assert refusal(main, args).startswith(complaint)
    assert not (tmp_path / "run").exists()


def test_another_base_wants_prompts_of_the_class(photos, pipeline_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    flags = [str(photos / "0"), "--base", str(pipeline_folder), *SMALL, "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"^--class-prompts: name a file with sentences of the class"):
        main(parse_arguments(flags))
    with pytest.raises(UserError, match=r"empty\.txt: holds no prompts; write one a line"):
        main(parse_arguments([*flags, "--class-prompts", str(tmp_path / "empty.txt")]))
    assert not (tmp_path / "run").exists()


def test_matrices_are_exchanged_in_the_unets_dtype(pipeline_folder, matrices):
    unet = load_base(pipeline_folder, dtype=torch.bfloat16).unet
    changed = with_matrices(unet, matrices)
    name = next(iter(matrices))
    assert torch.equal(changed.get_parameter(name), matrices[name].bfloat16())

"""Learning concepts together: what changes and what stays, the pictures of their class, resume, and bad input."""

import json

import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors
from common.cli import options_from
from common.training import Trainer
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.miniature.scenes import read_prompt
from p3_personalization import custom_diffusion
from p3_personalization.custom_diffusion import CustomOptions, class_prompts, main, parse_arguments
from p3_personalization.words import matrix_names
from tests.training import killed_at, same_files, spied_on, touched


@pytest.fixture
def arguments(photos, learning_arguments):
    few = ["--steps", "4", "--save-every", "2", "--validate-every", "2", "--sample-every", "100", "--lr", "0.02"]
    return [*learning_arguments, *few, "--class-images", "3", "--class-prompts", str(photos / "class.txt")]


@pytest.fixture
def call(arguments, tmp_path):
    return lambda *flags: main(parse_arguments([*arguments, "--out", str(tmp_path / "run"), *flags]))


def test_a_run_trains_words_and_matrices_and_leaves_the_base_as_it_is(call, pipeline_folder, tmp_path, monkeypatch):
    seen = spied_on(monkeypatch, custom_diffusion)
    path, base = call("--show", "red <new1>"), seen.base
    assert touched(base, pipeline_folder) == []
    matrices = [f"matrices.{name.replace('.', '/')}" for name in matrix_names(base.unet)]
    assert sorted(seen.trainer.state.trained) == sorted(["rows", *matrices])
    tensors, about = load_tensors(path)
    assert (about["step"], about["training"]["class_share"]) == (4, 0.75)
    assert {"<new1>", "<new2>"} <= tensors.keys()
    for name, stored in matrix_names(base.unet).items():
        change = (tensors[stored] - base.unet.get_parameter(name)).abs()
        assert 1e-3 < change.max() < 0.2
    state, _ = load_tensors(tmp_path / "run" / "state_00000004.safetensors")
    assert not any("conv" in name or "encoder" in name for name in state)  # what is frozen is not in it
    with Image.open(tmp_path / "run" / "samples_00000004.png") as picture:
        assert picture.size == (4 * 66 + 2, 3 * 66 + 2)


def test_the_class_is_drawn_once_by_the_base_and_is_in_every_batch(call, base, tmp_path, monkeypatch):
    batches, take_step = [], Trainer.take_step

    def watch(trainer):
        batches.append(trainer.make_batch(trainer.step, torch.Generator()))
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", watch)
    call("--steps", "2", "--class-share", "0.25")
    images, about = load_tensors(path := tmp_path / "run" / "class.safetensors")
    assert about["prompts"] == ["red toy", "blue toy", "red toy"]
    items = [(prompt, (9, k)) for k, prompt in enumerate(about["prompts"])]
    drawn = draw_prompts(base, items, PromptOptions(2, guidance_scale=2.0))
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


def test_a_killed_run_ends_like_an_undisturbed_one(call, arguments, tmp_path):
    whole = main(parse_arguments([*arguments, "--out", str(tmp_path / "whole")]))
    with killed_at(3):
        call()
    assert same_files(call(), whole)


def test_the_validation_loss_falls_without_prior_preservation_too(learning_arguments, tmp_path):
    """Then no class is drawn, and no prompts of it are needed."""
    flags = ["--steps", "12", "--lr", "0.02", "--validate-every", "4", "--sample-every", "100", "--class-share", "0"]
    main(parse_arguments([*learning_arguments, *flags, "--out", str(tmp_path)]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]
    assert not (tmp_path / "class.safetensors").exists()


def test_the_miniatures_class_are_circles_of_one_and_of_two():
    prompts = class_prompts(options_from(parse_arguments(["--class-images", "6"]), CustomOptions), seed=0)
    assert len(prompts) == 6
    assert {len(read_prompt(prompt)[0]) for prompt in prompts} == {1, 2}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--class-share", "1"], "--class-share 1.0: must be at least 0 and below 1"),
        ([], "--class-prompts: name a file with prompts of the class"),
        (["--class-prompts", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--class-share", "0", "--show", "a <new3>"], "prompt 'a <new3>': <new3> is no learned word"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(learning_arguments, tmp_path, refusal, flags, complaint):
    args = parse_arguments([*learning_arguments, "--out", str(tmp_path / "run"), *flags])
    assert refusal(main, args).startswith(complaint)
    assert not (tmp_path / "run").exists()

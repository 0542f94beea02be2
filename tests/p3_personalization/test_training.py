"""Learning words, alone or with matrices: what changes and what stays, the pictures of the class, resume, bad input."""

import pytest
import torch
from PIL import Image

from common.checkpoint import load_about, load_tensors
from common.cli import UserError, options_from
from latent_diffusion.base import load_base
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.miniature.scenes import read_prompt
from p3_personalization import custom_diffusion, textual_inversion
from p3_personalization.custom_diffusion import CustomOptions, class_pictures, class_prompts
from p3_personalization.learning import ConceptOptions
from p3_personalization.words import load_words, matrix_names
from tests.programs import parse, run
from tests.training import killed_at, metrics, same_files, spied_on, touched


@pytest.fixture
def call(learning_arguments, photos, tmp_path):
    """A function that trains for four steps and returns the file of what was learned."""
    own = {
        textual_inversion: ["--vectors", "2"],
        custom_diffusion: ["--lr", "0.02", "--class-images", "3", "--class-prompts", str(photos / "class.txt")],
    }
    few = ["--steps", "4", "--save-every", "2", "--validate-every", "2", "--sample-every", "4"]

    def train(program, *flags, out="run"):
        return run(program, *learning_arguments, *few, *own[program], "--out", tmp_path / out, *flags)

    return train


def test_the_words_of_all_folders_are_learned_and_nothing_else(call, base, pipeline_folder, monkeypatch):
    seen = spied_on(monkeypatch, textual_inversion)
    path = call(textual_inversion)
    assert touched(seen.base, pipeline_folder) == []
    assert {name: tuple(p.shape) for name, p in seen.trainer.state.trained.items()} == {"rows": (4, 16)}
    words, about = load_words(path), load_about(path)
    assert {token: rows.shape for token, rows in words.items()} == {"<new1>": (2, 16), "<new2>": (2, 16)}
    start = base.text_encoder.get_input_embeddings().weight[base.tokenizer.convert_tokens_to_ids("r</w>")]
    assert all((row - start).abs().max() > 0.01 for rows in words.values() for row in rows)
    assert (about["step"], about["vectors"]) == (4, {"<new1>": 2, "<new2>": 2})
    assert about["training"]["initialiser"] == ["r", "r"]
    assert about["validation_loss"] > 0


def test_custom_diffusion_learns_matrices_too_and_leaves_the_base_as_it_is(
    call, pipeline_folder, tmp_path, monkeypatch
):
    seen = spied_on(monkeypatch, custom_diffusion)
    path, base = call(custom_diffusion, "--show", "red <new1>"), seen.base
    assert touched(base, pipeline_folder) == []
    matrices = [f"matrices.{name.replace('.', '/')}" for name in matrix_names(base.unet)]
    assert sorted(seen.trainer.state.trained) == sorted(["rows", *matrices])
    tensors, about = load_tensors(path)
    assert (about["step"], about["training"]["class_share"]) == (4, 0.75)
    assert {"<new1>", "<new2>"} <= tensors.keys()
    for name, stored in matrix_names(base.unet).items():
        change = (tensors[stored] - base.unet.get_parameter(name)).abs()
        assert 1e-3 < change.max() < 0.2
    with Image.open(tmp_path / "run" / "samples_00000004.png") as picture:
        assert picture.size == (4 * 66 + 2, 3 * 66 + 2)


def test_the_class_is_drawn_once_by_a_base_and_is_in_every_batch(call, base, pipeline_folder, tmp_path, monkeypatch):
    seen, flags = spied_on(monkeypatch, custom_diffusion), ("--steps", "2", "--class-share", "0.25")
    call(custom_diffusion, *flags)
    images, about = load_tensors(path := tmp_path / "run" / "class.safetensors")
    assert about["prompts"] == ["red toy", "blue toy", "red toy"]
    items = [(prompt, (9, k)) for k, prompt in enumerate(about["prompts"])]
    drawn = draw_prompts(base, items, PromptOptions(2, guidance_scale=2.0))
    assert torch.equal(images["images"], drawn)
    latents = base.encode_images(drawn / 127.5 - 1)
    for step in range(2):
        batch = seen.trainer.make_batch(step, torch.Generator())
        own = [(latents - x0).abs().amax(dim=(1, 2, 3)).min() < 1e-4 for x0 in batch["x0"]]
        assert own == [False, False, False, True]
        assert batch["tokens"].max() >= 190  # a new word
        assert batch["tokens"][3].max() < 190
    written = path.stat().st_mtime_ns
    call(custom_diffusion, *flags)
    assert path.stat().st_mtime_ns == written
    call(custom_diffusion, *flags, "--class-images", "2")
    assert len(load_tensors(path)[0]["images"]) == 2
    changed, size = load_base(pipeline_folder), []
    for part in (changed.unet, changed.vae, changed.text_encoder):
        next(part.parameters()).data[0] += 1
        monkeypatch.setattr(custom_diffusion, "draw_prompts", lambda *_: size.append(1) or drawn)
        for _ in range(2):
            class_pictures(changed, about["prompts"], 0, 2.0, path)
    assert len(size) == 3  # by each base once


@pytest.mark.parametrize("program", [textual_inversion, custom_diffusion])
def test_a_killed_run_ends_like_an_undisturbed_one(call, program, tmp_path):
    whole = call(program, out="whole")
    with killed_at(3):
        call(program)
    assert not (tmp_path / "run" / whole.name).exists()
    assert same_files(call(program), whole)


def test_the_validation_loss_falls_without_prior_preservation_too(learning_arguments, tmp_path):
    """Then no class is drawn, and no prompts of it are needed."""
    flags = ["--steps", "12", "--lr", "0.02", "--validate-every", "4", "--sample-every", "100", "--class-share", "0"]
    run(custom_diffusion, *learning_arguments, *flags, "--out", tmp_path)
    losses = [line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]
    assert not (tmp_path / "class.safetensors").exists()


def test_the_miniatures_class_are_circles_of_one_and_of_two():
    prompts = class_prompts(options_from(parse(custom_diffusion, "--class-images", 6), CustomOptions), seed=0)
    assert len(prompts) == 6
    assert {len(read_prompt(prompt)[0]) for prompt in prompts} == {1, 2}


@pytest.mark.parametrize(
    ("program", "flags", "complaint"),
    [
        (textual_inversion, ["--token", "<a>"], "--token: 1 for 2 folders of photos; give one for each"),
        (textual_inversion, ["--token", "<a>", "<a>"], "--token <a>: is given to two folders of photos; give each its"),
        (textual_inversion, ["--token", "<a>", "b"], "token 'b': write it in angle brackets"),
        (textual_inversion, ["--initialiser", "a", "b", "c"], "--initialiser: 3 for 2 folders of photos; give one for"),
        (textual_inversion, ["--vectors", "0"], "--vectors 0: must be at least 1"),
        (textual_inversion, ["--smallest-crop", "0"], "--smallest-crop 0.0: must be 0.05 to 1"),
        (textual_inversion, ["--template", "{} and <new9>"], "prompt '<new1> and <new9>': <new9> is no learned word"),
        (custom_diffusion, ["--class-share", "1"], "--class-share 1.0: must be at least 0 and below 1"),
        (custom_diffusion, [], "--class-prompts: name a file with prompts of the class"),
        (custom_diffusion, ["--class-prompts", "nowhere.txt"], "nowhere.txt: no such file"),
        (custom_diffusion, ["--class-share", "0", "--show", "<new3>"], "prompt '<new3>': <new3> is no learned word"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    learning_arguments, tmp_path, refusal, program, flags, complaint
):
    args = parse(program, *learning_arguments, "--out", tmp_path / "run", *flags)
    assert refusal(program.main, args).startswith(complaint)
    assert not (tmp_path / "run").exists()


def test_words_to_start_from_are_known_for_the_miniatures_concepts_alone(photos):
    def options(*flags):
        return options_from(parse(textual_inversion, *flags), ConceptOptions)

    own = options()
    assert (own.initialiser, own.token, own.flip) == (["purple", "olive"], ["<new1>", "<new2>"], False)
    with pytest.raises(UserError, match=r"^--initialiser: name a known word"):
        options(str(photos / "0"))
    assert options(str(photos / "0"), "--initialiser", "dog").flip

"""Learning words, and words with matrices: what changes and what stays, the class's pictures, resume, and bad input."""

import json

import pytest
import torch
from PIL import Image

from common.checkpoint import load_about, load_tensors
from common.cli import UserError, options_from
from common.training import Trainer
from latent_diffusion.base import load_base
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.miniature.scenes import read_prompt
from latent_diffusion.saving import save_base
from p3_personalization import custom_diffusion, textual_inversion
from p3_personalization.custom_diffusion import CustomOptions
from p3_personalization.learning import ConceptOptions
from p3_personalization.words import add_words, load_custom, load_words, matrix_names
from tests.training import killed_at, same_files, spied_on, touched

BOTH = pytest.mark.parametrize("program", [textual_inversion, custom_diffusion])


@pytest.fixture
def call(learning_arguments, photos, tmp_path):
    """A function that runs one of the programs in a folder of its own."""

    def call(program, *flags):
        own = ["--class-images", "3", "--class-prompts", str(photos / "class.txt"), "--lr", "0.02"]
        arguments = [*learning_arguments, "--out", str(tmp_path / "run"), *own * (program is custom_diffusion), *flags]
        return program.main(program.parse_arguments(arguments))

    return call


@pytest.fixture
def finished(call, tmp_path):
    """The words of an undisturbed run of six steps, with two vectors a word."""
    return call(textual_inversion, "--vectors", "2", "--out", str(tmp_path / "finished"))


def test_a_run_leaves_the_words_of_all_folders_in_one_file(finished, base):
    words, about = load_words(finished), load_about(finished)
    assert {token: rows.shape for token, rows in words.items()} == {"<new1>": (2, 16), "<new2>": (2, 16)}
    before = base.text_encoder.get_input_embeddings().weight
    start = before[base.tokenizer.convert_tokens_to_ids("r</w>")]
    for rows in words.values():
        assert all((row - start).abs().max() > 0.01 for row in rows)
    assert (about["step"], about["vectors"]) == (6, {"<new1>": 2, "<new2>": 2})
    assert about["training"]["initialiser"] == ["r", "r"]
    assert about["validation_loss"] > 0
    with Image.open(finished.parent / "samples_00000006.png") as picture:
        assert picture.size == (4 * 66 + 2, 2 * 66 + 2)


def test_a_run_leaves_words_and_matrices(call, base, tmp_path):
    path = call(custom_diffusion, "--show", "red <new1>")
    tensors, about = load_tensors(path)
    assert (about["step"], about["training"]["class_share"]) == (6, 0.75)
    assert {"<new1>", "<new2>"} <= tensors.keys()
    for name, stored in matrix_names(base.unet).items():
        change = (tensors[stored] - base.unet.get_parameter(name)).abs()
        assert 1e-3 < change.max() < 0.2
    loaded = load_custom(base, path)
    assert draw_prompts(loaded, [("<new1> and <new2>", (0,))], PromptOptions(2)).shape == (1, 3, 64, 64)
    state, _ = load_tensors(tmp_path / "run" / "state_00000006.safetensors")
    assert not any("conv" in name or "encoder" in name for name in state)  # what is frozen is not in it
    with Image.open(tmp_path / "run" / "samples_00000006.png") as picture:
        assert picture.size == (4 * 66 + 2, 3 * 66 + 2)


@BOTH
def test_nothing_else_is_trained_and_the_base_stays_as_it_is(call, base, pipeline_folder, monkeypatch, program):
    seen = spied_on(monkeypatch, program)
    call(program, "--steps", "2")
    assert touched(seen.base, pipeline_folder) == []
    matrices = [f"matrices.{name.replace('.', '/')}" for name in matrix_names(base.unet)]
    wanted = ["rows", *matrices] if program is custom_diffusion else ["rows"]
    assert sorted(seen.trainer.state.trained) == sorted(wanted)


@BOTH
def test_a_killed_run_ends_like_an_undisturbed_one(call, tmp_path, program):
    whole = call(program, "--out", str(tmp_path / "whole"))
    with killed_at(4):
        call(program)
    assert not (tmp_path / "run" / whole.name).exists()
    assert same_files(call(program), whole)


@BOTH
def test_the_validation_loss_falls(call, tmp_path, program):
    """The small base is random, and yet some words suit the photos better than others; no class is needed for it."""
    flags = ["--class-share", "0"] if program is custom_diffusion else ["--lr", "0.05"]
    call(program, "--steps", "30", "--validate-every", "10", "--sample-every", "30", *flags)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < (0.99 if program is custom_diffusion else 1) * losses[0]
    assert not (tmp_path / "run" / "class.safetensors").exists()


def test_the_class_is_drawn_once_by_the_base_and_is_in_every_batch(call, base, tmp_path, monkeypatch):
    batches = []
    take_step = Trainer.take_step

    def watch(trainer):
        batches.append(trainer.make_batch(trainer.step, torch.Generator()))
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", watch)
    few = ["--steps", "2", "--class-share", "0.25"]
    call(custom_diffusion, *few)
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
    call(custom_diffusion, *few)
    assert path.stat().st_mtime_ns == written
    call(custom_diffusion, *few, "--class-images", "2")
    assert len(load_tensors(path)[0]["images"]) == 2


def test_the_miniatures_class_are_circles_of_one_and_of_two():
    options = options_from(custom_diffusion.parse_arguments(["--class-images", "6"]), CustomOptions)
    prompts = custom_diffusion.class_prompts(options, seed=0)
    assert len(prompts) == 6
    assert {len(read_prompt(prompt)[0]) for prompt in prompts} == {1, 2}
    assert prompts != custom_diffusion.class_prompts(options, seed=1)


@pytest.mark.parametrize(
    ("program", "flags", "complaint"),
    [
        (textual_inversion, ["--token", "<a>"], "--token: 1 for 2 folders of photos; give one for each"),
        (textual_inversion, ["--token", "<a>", "<a>"], "--token <a>: is given to two folders of photos; give each its"),
        (textual_inversion, ["--token", "<a>", "b"], "token 'b': write it in angle brackets"),
        (textual_inversion, ["--initialiser", *"abc"], "--initialiser: 3 for 2 folders of photos; give one for each"),
        (textual_inversion, ["--initialiser", "red"], "--initialiser 'red': is 3 tokens (r, e, d); give 1 to 1, or"),
        (textual_inversion, ["--initialiser", " "], "--initialiser ' ': is 0 tokens (); give 1 to 1, or raise --vec"),
        (textual_inversion, ["--vectors", "0"], "--vectors 0: must be at least 1"),
        (textual_inversion, ["--views", "0"], "--views 0: must be at least 1"),
        (textual_inversion, ["--smallest-crop", "0"], "--smallest-crop 0.0: must be 0.05 to 1"),
        (
            textual_inversion,
            ["--template", "a photo"],
            "template 'a photo': has no {}; write {} where the token <new1>",
        ),
        (textual_inversion, ["--template", "{} and <new9>"], "prompt '<new1> and <new9>': <new9> is no learned word"),
        (textual_inversion, ["--steps", "0"], "--steps 0: must be above 0"),
        (textual_inversion, ["--base", "nowhere"], "nowhere: no such file or folder; name a Stable Diffusion v1"),
        (custom_diffusion, ["--class-share", "1"], "--class-share 1.0: must be at least 0 and below 1"),
        (custom_diffusion, ["--class-images", "0"], "--class-images 0: must be at least 1"),
        (custom_diffusion, ["--class-prompts", "nowhere.txt"], "nowhere.txt: not a readable text file"),
        (custom_diffusion, ["--show", "a <new3>"], "prompt 'a <new3>': <new3> is no learned word"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(call, tmp_path, refusal, program, flags, complaint):
    assert refusal(lambda _: call(program, *flags), None).startswith(complaint)
    assert not (tmp_path / "run").exists()


def test_defaults_that_suit_the_miniature_alone(photos, learning_arguments):
    options = options_from(textual_inversion.parse_arguments([]), ConceptOptions)
    assert (options.initialiser, options.token, options.flip) == (["purple", "olive"], ["<new1>", "<new2>"], False)
    with pytest.raises(UserError, match=r"^--initialiser: name a known word"):
        options_from(textual_inversion.parse_arguments([str(photos / "0")]), ConceptOptions)
    assert options_from(textual_inversion.parse_arguments(learning_arguments), ConceptOptions).flip
    with pytest.raises(UserError, match=r"^--class-prompts: name a file with prompts of the class"):
        custom_diffusion.main(custom_diffusion.parse_arguments(learning_arguments))


def test_a_base_with_words_can_be_saved_and_its_tokens_are_refused(call, finished, base, tmp_path):
    extended = add_words(base, load_words(finished))
    save_base(tmp_path / "base", extended)
    again = load_base(tmp_path / "base").encode_prompts(["a <new1>"])
    assert (again - extended.encode_prompts(["a <new1>"])).abs().max() <= 0.01
    with pytest.raises(UserError, match=r"^token '<new1>': exists already; choose another$"):
        call(textual_inversion, "--base", str(tmp_path / "base"))
    assert not (tmp_path / "run").exists()

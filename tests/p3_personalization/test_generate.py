"""What the Fall 2024 grader finds: the files, pixels against diffusers' pipeline, and what is refused."""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from common.cli import UserError, run
from common.sampling import ImageNoise
from latent_diffusion.base import load_base, quiet
from latent_diffusion.drawing import draw_prompts
from p3_personalization import generate
from p3_personalization.generate import DrawingOptions, pictures, with_learned


@pytest.fixture
def arguments(table, words_file, pipeline_folder, tmp_path):
    """The arguments of a run of two steps in fp32, with further flags."""

    def make(*flags, out=tmp_path / "out", table=table):
        fixed = [table, out, pipeline_folder, "--words", words_file, "--steps", 2, "--precision", "fp32"]
        return generate.parse_arguments([str(argument) for argument in [*fixed, *flags]])

    return make


@pytest.fixture
def drawn(arguments):
    """A function that runs generate.py and returns the pixels of the files in OUT by their names."""

    def draw(*flags, **options) -> dict[str, np.ndarray]:
        args = arguments(*flags, **options)
        files = generate.main(args)
        assert sorted(files) == sorted(path for path in args.out.rglob("*") if path.is_file())
        return {str(path.relative_to(args.out)): np.asarray(Image.open(path)) for path in files}

    return draw


def largest_difference(some, others) -> int:
    return max(np.abs(some[name].astype(int) - others[name]).max() for name in some)


def test_the_grader_s_layout(drawn, tmp_path, capsys):
    images = drawn()
    wanted = [f"{c}/{p}/source{c}_prompt{p}_{n}.png" for c in range(2) for p in range(2) for n in range(25)]
    assert list(images) == wanted
    assert {(image.shape, image.dtype.name) for image in images.values()} == {((64, 64, 3), "uint8")}
    assert len({image.tobytes() for image in images.values()}) == 100
    assert Image.open(tmp_path / "out" / wanted[0]).format == "PNG"
    assert capsys.readouterr().out == f"100 pictures in {tmp_path / 'out'}\n"


def test_pictures_are_those_of_diffusers_with_the_same_words(drawn, table, words_file, pipeline_folder):
    images = drawn("--sampler", "ddim", "--guidance-scale", 3, "--count", 2, "--seed", 5)
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    plain = pipeline("circle", latents=torch.ones(1, 4, 8, 8), num_inference_steps=2, output_type="np").images
    pipeline.load_textual_inversion([{token: rows} for token, rows in load_file(words_file).items()])
    for number, concept in json.loads(table.read_text()).items():
        for p, prompt in enumerate(concept["prompt"]):
            noise = ImageNoise([(5, zlib.crc32(prompt.encode()), k) for k in range(2)]).draw((4, 8, 8))
            theirs = pipeline(
                [prompt] * 2, latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="np"
            ).images
            for k in range(2):
                ours = images[f"{number}/{p}/source{number}_prompt{p}_{k}.png"]
                assert ours.std() > 10
                assert np.abs(ours - theirs[k] * 255).max() <= 1
    again = pipeline("circle", latents=torch.ones(1, 4, 8, 8), num_inference_steps=2, output_type="np").images
    assert np.array_equal(plain, again)


def test_a_picture_depends_on_seed_prompt_and_number_alone(drawn, table, tmp_path):
    all_of_them = drawn("--count", 3)
    few = drawn("--count", 2, "--batch-size", 3, out=tmp_path / "few")
    assert largest_difference(few, all_of_them) <= 1
    entries = json.loads(table.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"7": {"token_name": "<new2>", "prompt": entries["1"]["prompt"][1:]}}))
    alone = drawn("--count", 3, out=tmp_path / "alone", table=other)
    for k in range(3):
        image = alone[f"7/0/source7_prompt0_{k}.png"].astype(int)
        assert np.abs(image - all_of_them[f"1/1/source1_prompt1_{k}.png"]).max() <= 1
    seeded = drawn("--count", 2, "--seed", 1, out=tmp_path / "seeded")
    assert min(np.abs(seeded[name].astype(int) - few[name]).max() for name in few) > 5


def test_prompts_without_a_learned_word_give_the_pixels_that_they_gave(pipeline_folder, words_file):
    base = load_base(pipeline_folder)
    prompts = [("red circle with blue background", 0), ("", 3)]
    options = DrawingOptions(steps=3)
    before = list(pictures(base, prompts, options))
    after = list(pictures(with_learned(base, [words_file]), prompts, options))
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    new = list(pictures(with_learned(base, [words_file]), [("<new1> circle", 0)], options))
    assert (new[0].int() - before[0].int()).abs().max() > 5


def test_custom_diffusion_is_its_words_and_its_matrices(drawn, custom_file, table, pipeline_folder, tmp_path):
    by_words = drawn("--count", 1)

    def by_custom(factor):
        out = tmp_path / f"{factor}"
        flags = ["--custom", custom_file(factor), "--count", 1, "--steps", 2, "--precision", "fp32"]
        files = generate.main(generate.parse_arguments([str(a) for a in [table, out, pipeline_folder, *flags]]))
        return {str(file.relative_to(out)): np.asarray(Image.open(file)) for file in files}

    assert largest_difference(by_words, by_custom(1)) == 0
    assert largest_difference(by_words, by_custom(-1)) > 5


PROMPTS = [("gold", 0), ("red", 1), ("red", 2), ("navy", 0), ("tan", 5)]


def test_a_batch_that_does_not_fit_is_halved(pipeline_folder, monkeypatch):
    base, sizes = load_base(pipeline_folder), []

    def with_little_memory(base, prompts, *options):
        sizes.append(len(prompts))
        if len(prompts) > fitting:
            raise torch.OutOfMemoryError
        return draw_prompts(base, prompts, *options)

    monkeypatch.setattr(generate, "draw_prompts", with_little_memory)
    options = DrawingOptions(steps=2)
    fitting = 8
    whole = torch.stack(list(pictures(base, PROMPTS, options)))
    fitting = 1
    parts = torch.stack(list(pictures(base, PROMPTS, options)))
    assert sizes == [5, 5, 2, 1, 1, 1, 1, 1]
    assert (whole.int() - parts.int()).abs().max() <= 1
    fitting = 0
    with pytest.raises(UserError, match="does not fit the GPU's memory; add --precision fp16"):
        list(pictures(base, PROMPTS, options))


def test_what_overflows_in_half_precision_is_drawn_in_fp32(pipeline_folder, monkeypatch, capsys):
    def overflowing(base, *options):
        if base.unet.dtype != torch.float32:
            raise FloatingPointError
        return draw_prompts(base, *options)

    monkeypatch.setattr(generate, "draw_prompts", overflowing)
    options = DrawingOptions(steps=2, batch_size=2)
    drawn = torch.stack(list(pictures(load_base(pipeline_folder, dtype=torch.bfloat16), PROMPTS, options)))
    exact = torch.stack(list(pictures(load_base(pipeline_folder), PROMPTS, options)))
    assert (drawn.float() - exact.float()).abs().mean() < 4  # the weights were rounded
    assert capsys.readouterr().err.count("overflow in torch.bfloat16") == 1
    broken = load_base(pipeline_folder)
    broken.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(UserError, match="'gold': drawn in fp32 it is not finite"):
        list(pictures(broken, PROMPTS, options))


def test_other_files_in_the_way_are_refused_or_removed(drawn, arguments, tmp_path, capsys):
    folder = tmp_path / "out" / "1" / "0"
    folder.mkdir(parents=True)
    (folder / "source1_prompt0_0.png").write_bytes(b"old")
    (folder / "source1_prompt0_2.png").write_bytes(b"surplus")
    with pytest.raises(SystemExit):
        run(generate.main, arguments("--count", 2))
    assert "already holds 1 other files (source1_prompt0_2.png, ...)" in capsys.readouterr().err
    assert (folder / "source1_prompt0_0.png").read_bytes() == b"old"
    assert len(drawn("--count", 2, "--overwrite")) == 8


def test_more_steps_than_the_base_has_are_refused_before_files_go(arguments, pipeline_folder, tmp_path, refusal):
    short = tmp_path / "short"
    shutil.copytree(pipeline_folder, short)
    file = short / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": 20}))
    surplus = tmp_path / "out" / "0" / "0" / "surplus.png"
    surplus.parent.mkdir(parents=True)
    surplus.write_bytes(b"old")
    args = arguments("--steps", 21, "--overwrite")
    args.base = short
    assert "--steps 21: 21 steps: choose from 1 to 20" in refusal(generate.main, args)
    assert surplus.read_bytes() == b"old"


@pytest.fixture
def complaint(refusal):
    """A function that gives the line with which the program refuses its arguments, having drawn nothing."""

    def refused(args) -> str:
        line = refusal(generate.main, args)
        assert not [path for path in args.out.rglob("*") if path.is_file()]
        return line

    return refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--count", 0], "--count 0: starts at 1"),
        (["--batch-size", 0], "--batch-size 0: from 1"),
        (["--steps", 0], "--steps 0: from 1 to 1000"),
        (["--seed", -1], "--seed -1: from 0"),
        (["--guidance-scale", -1], "--guidance-scale -1.0: must be at least 0"),
        (["--words", "absent.safetensors"], "absent.safetensors: no such weights file"),
        (["--custom", "absent.safetensors"], "absent.safetensors: no such weights file"),
    ],
)
def test_bad_flags_are_one_clear_line(arguments, complaint, flags, words):
    assert words in complaint(arguments(*flags))


@pytest.mark.parametrize(
    ("token", "prompt", "words"),
    [
        ("<new1>", "a red circle", "is without <new1>"),
        ("<new3>", "a <new3> circle", "<new3> is no learned word"),
        ("<new1>", "<new1> beside <other>", "<other> is no learned word"),
    ],
)
def test_prompts_and_words_must_go_together(arguments, table, complaint, token, prompt, words):
    table.write_text(json.dumps({"0": {"token_name": token, "prompt": [prompt]}}))
    error = complaint(arguments())
    assert error.startswith(f"{table} concept '0': ")
    assert words in error


def test_words_of_another_base_are_refused(arguments, tmp_path, complaint):
    path = tmp_path / "wide.safetensors"
    save_file({"<new1>": torch.zeros(1, 768)}, path)
    assert "768 wide, the base's 16" in complaint(arguments("--words", path))


def test_a_student_s_own_words_are_found_by_their_place(
    table, words_file, pipeline_folder, tmp_path, complaint, monkeypatch
):
    own = tmp_path / "checkpoints" / "words_sd.safetensors"
    monkeypatch.setattr(generate, "OWN_WORDS", own)
    args = generate.parse_arguments([str(table), str(tmp_path / "out"), str(pipeline_folder), "--count", "1"])
    error = complaint(args)
    assert f"no words for {pipeline_folder}: put them at {own}, or name them with --words" in error
    own.parent.mkdir()
    own.write_bytes(words_file.read_bytes())
    assert len(generate.main(args)) == 4
    assert generate.default_words(generate.BASE) == generate.WORDS


def test_guidance_is_the_base_s_unless_it_is_named():
    def scale(*flags):
        return generate.drawing_options(generate.parse_arguments(list(flags))).guidance_scale

    assert scale() == generate.MINIATURE_GUIDANCE_SCALE
    assert scale("input.json", "out", "sd-v1-4.ckpt") == 7.5
    assert scale("--guidance-scale", "3") == 3


@pytest.mark.slow
def test_the_original_single_file_is_drawn_from(sd_file, tmp_path):
    generator = torch.Generator().manual_seed(3)
    words, table, images = tmp_path / "words.safetensors", tmp_path / "input.json", []
    table.write_text(json.dumps({"0": {"token_name": "<new1>", "prompt": ["A photo of <new1>."]}}))
    for k in range(2):
        save_file({"<new1>": torch.randn(2, 48, generator=generator)}, words)
        arguments = [table, tmp_path / str(k), sd_file, "--words", words, "--count", 1, "--steps", 1]
        (file,) = generate.main(generate.parse_arguments([*map(str, arguments), "--precision", "fp32"]))
        images.append(np.asarray(Image.open(file)).astype(int))
    assert images[0].shape == (512, 512, 3)
    assert np.abs(images[0] - images[1]).max() > 5

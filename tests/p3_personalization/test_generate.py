"""What the Fall 2024 grader finds: its table, the files, pixels against diffusers' pipeline, and what is refused."""

import json
import zlib

import numpy as np
import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from common.sampling import ImageNoise
from p3_personalization import generate
from p3_personalization.generate import read_table
from tests.programs import parse, read

COURSE = {
    "0": {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["A dog <new1> on a hill", "A dog <new1> in a room"],
        "prompt_4_clip_eval": ["A dog on a hill", "A dog in a room"],
        "baseline": [[79, 34], [74, 35]],
    },
    "1": {"token_name": "<new2>", "prompt": "A house in the style of <new2>"},
}


def test_the_course_s_table(table):
    table.write_text(json.dumps(COURSE), encoding="utf-8-sig")
    dog, style = read_table(table)
    assert (dog.number, dog.token, style.number, style.token) == ("0", "<new1>", "1", "<new2>")
    assert dog.prompts == COURSE["0"]["prompt"]
    assert dog.judged_prompts == COURSE["0"]["prompt_4_clip_eval"]
    assert dog.baselines == [(79.0, 34.0), (74.0, 35.0)]
    assert (style.prompts, style.judged_prompts, style.baselines) == (["A house in the style of <new2>"], [], [])
    assert [str(file) for file in dog.files(1, 2)] == ["0/1/source0_prompt1_0.png", "0/1/source0_prompt1_1.png"]


def changed(**fields):
    return json.dumps({"0": COURSE["0"] | fields})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ": not JSON"),
        ("[]", ": not an object of concepts"),
        (json.dumps({"../x": COURSE["0"]}), " concept '../x': its name is no number"),
        (json.dumps({"0": []}), " concept '0': is []"),
        (changed(token_name=None), " concept '0': has no \"token_name\""),
        (changed(prompt=[]), " concept '0': has no \"prompt\""),
        (changed(prompt=[3, 4]), " concept '0': \"prompt\" is [3, 4]"),
        (changed(prompt=["<new1>"]), " concept '0': \"prompt_4_clip_eval\" has 2 entries for 1 prompts"),
        (changed(baseline=[[1, 2]]), " concept '0': \"baseline\" has 1 entries for 2 prompts"),
        (changed(baseline=[[1], [2]]), " concept '0': \"baseline\" is [[1], [2]]"),
        (None, ": no such file; write it as in"),
    ],
)
def test_bad_tables_are_refused(table, refusal, text, words):
    table.unlink() if text is None else table.write_text(text)
    assert refusal(read_table, table).startswith(f"{table}{words}")


@pytest.fixture
def arguments(table, words_file, pipeline_folder, tmp_path):
    """The arguments of a run of two steps in fp32, with further flags; --words is not given where --custom is."""

    def make(*flags):
        words = [] if "--custom" in flags else ["--words", words_file]
        places = table, tmp_path / "out", pipeline_folder
        return parse(generate, *places, *words, "--steps", 2, "--precision", "fp32", *flags)

    return make


@pytest.fixture
def drawn(arguments):
    """A function that runs generate.py and returns the pixels of the files in OUT by their names."""

    def draw(*flags) -> dict[str, np.ndarray]:
        args = arguments(*flags)
        files = generate.main(args)
        assert sorted(files) == sorted(path for path in args.out.rglob("*") if path.is_file())
        return {str(path.relative_to(args.out)): read(path) for path in files}

    return draw


def test_the_grader_s_layout(drawn, tmp_path):
    images = drawn()
    wanted = [f"{c}/{p}/source{c}_prompt{p}_{n}.png" for c in range(2) for p in range(2) for n in range(25)]
    assert list(images) == wanted
    assert len({image.tobytes() for image in images.values()}) == 100
    for name in wanted:
        with Image.open(tmp_path / "out" / name) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


@pytest.mark.parametrize(("spacing", "final_alpha"), [("trailing", "one"), ("leading", "first")])
def test_pictures_are_those_of_diffusers_with_the_same_words(
    drawn, table, words_file, pipeline_folder, spacing, final_alpha
):
    flags = "--sampler", "ddim", "--timestep-spacing", spacing, "--final-alpha", final_alpha
    images = drawn(*flags, "--guidance-scale", 3, "--count", 2, "--seed", 5)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    ours = {"timestep_spacing": spacing, "set_alpha_to_one": final_alpha == "one"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **ours)
    pipeline.load_textual_inversion([{token: rows} for token, rows in load_file(words_file).items()])
    for number, concept in json.loads(table.read_text()).items():
        for p, prompt in enumerate(concept["prompt"]):
            noise = ImageNoise([(5, zlib.crc32(prompt.encode()), k) for k in range(2)]).draw((4, 8, 8))
            options = {"latents": noise, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
            theirs = pipeline([prompt] * 2, **options).images
            for k in range(2):
                ours = images[f"{number}/{p}/source{number}_prompt{p}_{k}.png"]
                assert ours.std() > 10
                assert np.abs(ours - theirs[k] * 255).max() <= 1


def test_other_files_in_the_way_are_refused_or_removed(drawn, arguments, tmp_path, refusal):
    folder = tmp_path / "out" / "1" / "0"
    folder.mkdir(parents=True)
    (folder / "source1_prompt0_0.png").write_bytes(b"old")
    (folder / "source1_prompt0_2.png").write_bytes(b"surplus")
    error = refusal(generate.main, arguments("--count", 2))
    assert "already holds 1 other files (source1_prompt0_2.png, ...)" in error
    args = arguments("--count", 2, "--overwrite", "--steps", 1001)
    assert "--steps 1001: must be from 1 to 1000" in refusal(generate.main, args)
    assert {path.read_bytes() for path in folder.iterdir()} == {b"old", b"surplus"}
    assert len(drawn("--count", 2, "--overwrite")) == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--count", 0], "--count 0: must be at least 1"),
        (["--custom", "absent.safetensors"], "absent.safetensors: no such weights file"),
        ([], "{table} concept '0': prompt 'a <new3> circle': <new3> is no learned word"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(arguments, table, tmp_path, refusal, flags, words):
    table.write_text(json.dumps({"0": {"token_name": "<new3>", "prompt": ["a <new3> circle"]}}))
    assert refusal(generate.main, arguments(*flags)).startswith(words.format(table=table))
    assert not (tmp_path / "out").exists()


def test_a_student_s_own_words_are_found_by_their_place(arguments, words_file, tmp_path, refusal, monkeypatch):
    own = tmp_path / "checkpoints" / "words_sd.safetensors"
    monkeypatch.setattr(generate, "OWN_WORDS", own)
    args = arguments("--count", 1)
    args.words = None
    assert f"no words for {args.base}: put them at {own}, or name them" in refusal(generate.main, args)
    own.parent.mkdir()
    own.write_bytes(words_file.read_bytes())
    assert len(generate.main(args)) == 4
    assert generate.default_words(generate.BASE) == generate.WORDS


def test_guidance_is_the_base_s_unless_it_is_named():
    def scale(*flags):
        return generate.drawing_options(parse(generate, *flags)).scale

    assert scale() == generate.MINIATURE_GUIDANCE_SCALE
    assert scale("input.json", "out", "sd-v1-4.ckpt") == 7.5
    assert scale("--guidance-scale", "2") == 2

"""The report's figures and the shipped examples, drawn with a small model."""

import json

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from latent_diffusion.miniature.scenes import held_out, read_prompt
from latent_diffusion.pairs import read_pairs
from p3_controlnet import figures, make_examples
from p3_controlnet.make_examples import SINGLES, TWO


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    out = tmp_path_factory.mktemp("examples")
    make_examples.main(make_examples.parse_arguments([str(out), "--size", "64"]))
    return out


@pytest.fixture
def draw(examples, pipeline_folder, controlnet_folder, tmp_path):
    def run(*flags):
        weights = ["--base", str(pipeline_folder), "--controlnet", str(controlnet_folder), "--single", "/absent"]
        arguments = [str(tmp_path / "out"), *weights, "--examples", str(examples), "--steps", "2", *map(str, flags)]
        return {path.name: Image.open(path) for path in figures.main(figures.parse_arguments(arguments))}

    return run


def test_examples_are_held_out_circles_and_one_hint_with_two_prompts(examples):
    pairs = read_pairs(examples / "prompt.json", distinct_targets=True)
    singles, both = pairs[:SINGLES], pairs[SINGLES:]
    for pair in singles:
        (circle,), background = read_prompt(pair.prompt)
        assert held_out(circle, background)
    assert [pair.source for pair in both] == [TWO, TWO]
    assert [len(read_prompt(pair.prompt)[0]) for pair in both] == [1, 2]
    assert both[0].prompt == "gray circle with medium blue background"
    assert all((examples / pair.source).is_file() and (examples / pair.target).is_file() for pair in pairs)


def test_shipped_examples_are_what_the_script_makes(tmp_path):
    out = tmp_path / "examples"
    make_examples.main(make_examples.parse_arguments([str(out)]))
    shipped = make_examples.HERE / "examples"
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".png":
            new, old = (np.asarray(Image.open(folder / file)).astype(int) for folder in (out, shipped))
            assert np.abs(new - old).max() <= 1, file
        else:
            assert (out / file).read_text() == (shipped / file).read_text()


def test_figures_have_their_rows_and_columns(draw):
    pictures = draw("--only", "sides", "two", "strength")
    assert set(pictures) == {"sides.png", "two.png", "strength.png"}
    cell = 64 + 2
    assert pictures["sides.png"].height == 3 * cell + 2
    assert pictures["sides.png"].width > figures.SHOWN * cell
    assert pictures["two.png"].width > (1 + 2 * figures.SEEDS) * cell
    assert pictures["strength.png"].size[0] == (1 + len(figures.STRENGTHS)) * cell + 2


def test_no_control_and_full_control_differ(draw):
    strip = np.asarray(draw("--only", "strength")["strength.png"]).astype(int)
    cell, top = 66, strip.shape[0] - (4 * 66 + 2)
    columns = [strip[top:, 2 + k * cell : 2 + k * cell + 64] for k in range(1 + len(figures.STRENGTHS))]
    assert np.abs(columns[1] - columns[-1]).max() > 0
    assert columns[0].std() > 0


def test_a_second_controlnet_adds_a_row(draw, controlnet_folder):
    one = draw("--only", "two")["two.png"].height
    assert draw("--only", "two", "--single", controlnet_folder)["two.png"].height == one + 66


def test_the_story_shows_the_hints_once_and_more_of_the_beginning(draw, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for step in range(100, 2100, 100):
        Image.new("RGB", (40, 30), (step // 10, 0, 0)).save(run / f"samples_{step:08d}.png")
    picture = np.asarray(draw("--only", "story", "--run", run)["story.png"])
    reds = picture[5::10, -5, 0].tolist()
    assert reds == [10, 10, 20, 40, 80, 130, 200]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--only", "story"], "--only story: needs the folder of a run; name it with --run"),
        (["--only", "story", "--run", "{tmp}"], "{tmp}: holds no samples_*.png"),
        (["--only", "two", "--two", "absent.png"], "no line has the source absent.png; name one with --two"),
    ],
)
def test_bad_arguments_are_one_clear_line(draw, tmp_path, flags, complaint):
    with pytest.raises(UserError) as error:
        draw(*(flag.format(tmp=tmp_path) for flag in flags))
    assert complaint.format(tmp=tmp_path) in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_table_is_one_object_a_line(examples):
    lines = (examples / "prompt.json").read_text().splitlines()
    assert all(set(json.loads(line)) == {"source", "target", "prompt"} for line in lines)

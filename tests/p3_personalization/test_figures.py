"""The figures' sizes and counts, with a painter in place of the model, and with a small model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latent_diffusion.miniature.scenes import Circle, Scene, draw_target
from p3_personalization import figures
from p3_personalization.figures import CUSTOM_DIFFUSION, INVERSION
from tests.programs import read, run

SIZE = 64
CELL = SIZE + 2
PALETTE = {"white": (255, 255, 255), "wine": (120, 8, 56), "petrol": (0, 80, 120)}


def scene(*names) -> np.ndarray:
    discs = tuple(Circle(18.0 + 28 * k, 32.0, 11.0, name) for k, name in enumerate(names))
    return draw_target(Scene(discs, "white"), SIZE, PALETTE)


@pytest.fixture
def draw(table, words_file, custom_file, pipeline_folder, tmp_path):
    """A function that runs figures.py and returns what it wrote by name; three photos show each concept's disc."""
    custom, references = custom_file(-1), tmp_path / "references"
    for number, name in enumerate(("wine", "petrol")):
        (references / str(number)).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(scene(name)).save(references / str(number) / f"{k}.png")

    def drawn(*flags):
        fixed = ["--out", tmp_path / "out", "--table", table, "--references", references, "--base", pipeline_folder]
        fixed += ["--words", words_file, "--custom", custom, "--steps", 2, "--precision", "fp32"]
        files = run(figures, *fixed, *flags)
        assert sorted(files) == sorted((tmp_path / "out").iterdir())
        return {file.name: json.loads(file.read_text()) if file.suffix == ".json" else read(file) for file in files}

    return drawn


def test_photos_stand_above_what_each_method_draws_and_nothing_is_counted_in_photographs(draw):
    result = draw("--count", 2, "--prompt", "gold <new2> and <new1>")
    picture = result["learned.png"]
    assert picture.shape[0] == 24 + 6 * CELL + 2  # a title, and three rows for each of two concepts
    rows = picture[24:, -(5 * CELL + 2) :]
    for row, name in ((0, "wine"), (3, "petrol")):
        first = rows[row * CELL + 2 : row * CELL + 2 + SIZE, 2 : 2 + SIZE]
        assert np.array_equal(first, scene(name))
        # There are only three photos.
        assert (rows[row * CELL + 2 : (row + 1) * CELL, 3 * CELL + 2 :] == 255).all()
    assert not np.array_equal(rows[CELL : 2 * CELL], rows[2 * CELL : 3 * CELL])
    assert result["both.json"] == {"prompt": "gold <new2> and <new1>", "count": 2, "seed": 0}


def test_pictures_that_show_both_are_counted(draw, monkeypatch, capsys):
    calls = []

    def paint(base, items, options):
        calls.append(items)
        both, one = scene("wine", "petrol"), scene("wine")
        pictures = [both if len(calls) == 6 or k % 5 == 0 else one for k in range(len(items))]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    monkeypatch.setattr(figures, "draw_prompts", paint)
    result = draw("--count", 20, "--discs")
    prompt = "a <new1> next to a <new2>"
    assert calls[4:] == [figures.prompt_items(prompt, 20)] * 2
    assert result["both.json"] == {"prompt": prompt, "count": 20, "seed": 0, INVERSION: 0.2, CUSTOM_DIFFUSION: 1.0}
    assert "textual inversion: 20% of 20 pictures show both" in capsys.readouterr().out
    rows = result["both.png"][24:, -(8 * CELL + 2) :]
    assert np.array_equal(rows[2 : 2 + SIZE, 2 : 2 + SIZE], scene("wine", "petrol"))
    assert np.array_equal(rows[2 : 2 + SIZE, CELL + 2 : CELL + 2 + SIZE], scene("wine"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "a <new1> circle"], "--prompt: prompt 'a <new1> circle': is without <new2>"),
        (["--prompt", "<new1> <new2> <new3>"], "<new3> is no learned word"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--references", "absent"], "absent/0: no such folder; name one with images"),
        (["--table", "{}/one.json"], "one.json: has one concept; both.png needs two"),
    ],
)
def test_bad_arguments_are_one_clear_line(draw, tmp_path, refusal, flags, words):
    (tmp_path / "one.json").write_text(json.dumps({"0": {"token_name": "<new1>", "prompt": ["<new1>"]}}))
    assert words in refusal(lambda flags: draw(*flags), [flag.format(tmp_path) for flag in flags])
    assert not list((tmp_path / "out").glob("*"))

"""The report's figures, drawn with a small model."""

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from p3_controlnet import figures, fill50k

CELL = 64 + 2


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    flags = ["--count", "9", "--size", "64", "--circles", "1", "--report"]
    fill50k.main(fill50k.parse_arguments([str(folder), *flags]))
    return folder


@pytest.fixture
def draw(examples, pipeline_folder, controlnet_folder, tmp_path):
    def run(*flags):
        arguments = ["--out", tmp_path / "out", "--base", pipeline_folder, "--controlnet", controlnet_folder]
        arguments += ["--single", "/absent", "--examples", examples, "--steps", "2", *flags]
        files = figures.main(figures.parse_arguments([str(argument) for argument in arguments]))
        return {path.name: Image.open(path) for path in files}

    return run


def test_figures_have_their_rows_and_columns(draw, controlnet_folder):
    pictures = draw()
    assert set(pictures) == {"sides.png", "two.png", "strength.png"}
    assert pictures["sides.png"].height == 3 * CELL + 2
    assert pictures["sides.png"].width > figures.SHOWN * CELL
    assert pictures["two.png"].width > (1 + 2 * figures.SEEDS) * CELL
    assert pictures["strength.png"].width == (1 + len(figures.STRENGTHS)) * CELL + 2
    strip = np.asarray(pictures["strength.png"]).astype(int)[-4 * CELL - 2 :]
    none, *_, full = (strip[:, 2 + k * CELL : 2 + k * CELL + 64] for k in range(1, 1 + len(figures.STRENGTHS)))
    assert np.abs(none - full).max() > 0
    both = draw("--only", "two", "--single", controlnet_folder)
    assert both["two.png"].height == pictures["two.png"].height + CELL, "a second ControlNet adds a row"


def test_examples_without_two_circles_are_one_clear_line(draw, circles, tmp_path):
    with pytest.raises(UserError, match=r"prompt.json: no line has the source source/two.png"):
        draw("--only", "two", "--examples", circles)
    assert not (tmp_path / "out").exists()

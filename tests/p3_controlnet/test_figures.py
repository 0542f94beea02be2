"""The report's figures, and hints of every kind with the program that judges what is drawn after them."""

import json

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from common.data import read_image
from latent_diffusion.miniature.regions import circle_regions, hint_regions, intersection_over_union
from latent_diffusion.miniature.scenes import distances, draw_hint, random_scenes
from p3_controlnet import figures, robustness
from tests.programs import run

CELL = 64 + 2


@pytest.fixture
def draw(pipeline_folder, controlnet_folder, tmp_path):
    def drawn(*flags):
        arguments = ["--out", tmp_path / "out", "--base", pipeline_folder, "--controlnet", controlnet_folder]
        arguments += ["--single", "/absent", "--steps", "2"]
        return {path.name: Image.open(path) for path in run(figures, *arguments, *flags)}

    return drawn


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


SCENES = list(random_scenes(3, 512, 3, (1, 2), True))


@pytest.mark.parametrize("kind", [kind for kind in robustness.KINDS if kind not in ("inverted", "squeezed", "broken")])
def test_a_hint_shows_the_scene(kind):
    for k, scene in enumerate(SCENES):
        hint = robustness.make_hint(scene, k, kind)
        assert (hint.dtype, hint.shape) == (np.uint8, (512, 512, 3))
        if kind == "filled":
            regions = [hint[..., 0] > 0]
        else:
            regions = [np.logical_or.reduce(circle_regions(hint_regions(hint))[0])]
        truth = np.logical_or.reduce([distances(circle, 512) < circle.radius for circle in scene.circles])
        assert intersection_over_union(regions[0], truth) > 0.97


def test_other_files_are_read_so(tmp_path):
    scene = SCENES[0]
    plain = draw_hint(scene, 512)
    assert np.array_equal(robustness.make_hint(scene, 0, "inverted"), 255 - plain)
    Image.fromarray(plain[64:-64]).save(tmp_path / "0.png")
    difference = robustness.make_hint(scene, 0, "squeezed").astype(int) - read_image(tmp_path / "0.png", 512)
    assert np.abs(difference).max() == 0


def test_the_program_judges_every_kind(pipeline_folder, controlnet_folder, tmp_path, capsys):
    flags = "--base", pipeline_folder, "--controlnet", controlnet_folder, "--steps", 1, "--count", 1
    flags = *flags, "--kinds", "2px", "squeezed", "--json", tmp_path / "figures.json"
    figures = run(robustness, *flags)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert list(figures) == ["2px", "squeezed"]
    for kind in figures.values():
        assert kind["count"] == 1
        assert all(0 <= kind[circles][key] <= 1 for circles in ("one", "two") for key in kind["one"])
    assert "squeezed" in capsys.readouterr().out

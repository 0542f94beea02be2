"""The report's figures, hints of every kind with the program that judges what is drawn after them, and made circles."""

import json

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from common.data import read_image
from latent_diffusion.miniature.regions import circle_regions, hint_regions, intersection_over_union
from latent_diffusion.miniature.scenes import distances, draw_hint, held_out, random_scenes, read_prompt
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet import figures, fill50k, robustness
from p3_controlnet.sample import EXAMPLES
from tests.programs import parse, read, run

CELL = 64 + 2
SCENES = list(random_scenes(3, 512, 3, (1, 2), True))


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


def test_lines_of_one_width_and_rough_ones(tmp_path):
    flags, hints = ("--count", "6", "--size", "64"), {}
    kinds = {"plain": (), "wide": ("--line-width", "12"), "any": ("--rough",), "broken": ("--rough", "broken")}
    for name, more in kinds.items():
        table = run(fill50k, tmp_path / name, *flags, *more)
        hints[name] = read_hints(read_pairs(table), tmp_path / name, 64).int()
    assert table.read_text() == (tmp_path / "plain" / "prompt.json").read_text()
    assert (hints["wide"].sum(dim=(1, 2, 3)) > 1.3 * hints["plain"].sum(dim=(1, 2, 3))).all()
    assert hints["broken"].sum() < hints["plain"].sum()
    for target in (tmp_path / "plain" / "target").iterdir():
        assert target.read_bytes() == (tmp_path / "broken" / "target" / target.name).read_bytes()


def test_shipped_examples_are_what_it_makes(tmp_path):
    """Single circles of held-out colours, and one hint of two circles with two prompts."""
    (flags,) = (line for line in fill50k.__doc__.splitlines() if "--report" in line)
    run(fill50k, tmp_path, *flags.partition("#")[0].split()[3:])
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".png":
            assert np.abs(read(tmp_path / file) - read(EXAMPLES / file)).max() <= 1, file
    assert (tmp_path / "prompt.json").read_text() == (EXAMPLES / "prompt.json").read_text()
    *singles, gray, colours = read_pairs(EXAMPLES / "prompt.json", distinct_targets=True)
    assert len(singles) == 20
    assert all(held_out(names[0], background) for names, background in (read_prompt(p.prompt) for p in singles))
    assert gray.source == colours.source == fill50k.REPORT_HINT
    assert [len(read_prompt(pair.prompt)[0]) for pair in (gray, colours)] == [1, 2]


@pytest.mark.parametrize("flags", [["--count", "0"], ["--size", "31"], ["--seed", "-1"], ["--line-width", "0"]])
def test_bad_arguments_leave_nothing_behind(flags, tmp_path, refusal):
    line = refusal(fill50k.main, parse(fill50k, tmp_path / "out", "--count", "2", *flags))
    assert flags[1] in line
    assert not list(tmp_path.rglob("*.*"))

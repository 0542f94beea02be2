"""Drawn circles judged: the targets themselves, and what goes wrong with pictures, prompts and folders."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError, run
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import Circle, Scene, draw_hint, draw_target
from p3_controlnet import evaluate, fill50k

SIZE = 96


def one(colour="gold", background="navy", x=48.0):
    return Scene((Circle(x, 50.0, 25.0, colour),), background)


def two(left="red", right="sky blue", background="ivory"):
    return Scene((Circle(28.0, 40.0, 18.0, left), Circle(72.0, 60.0, 17.0, right)), background)


def judged(hint, picture=None, prompt=None):
    """The picture of one scene judged by the hint and the prompt of another."""
    drawn = draw_target(picture or hint, SIZE)
    return evaluate.judge(draw_hint(hint, SIZE), drawn, hint.prompt if prompt is None else prompt)


@pytest.mark.parametrize("scene", [one(), one(x=30), two(), two("red", "red")])
def test_a_target_is_all_right(scene):
    judgement = judged(scene)
    assert judgement.iou >= 0.98
    assert judgement.colours_right is True
    assert len(judgement.discs) == len(scene.circles)
    for area, circle in zip(judgement.discs, scene.circles):
        assert area.iou >= 0.97
        assert (area.named, area.nearest, area.difference, area.name_right) == (circle.colour, circle.colour, 0, True)
    assert (judgement.background.iou, judgement.background.nearest) == (None, scene.background)


def test_colours_in_the_wrong_places_are_wrong():
    judgement = judged(two("red", "sky blue"), two("sky blue", "red"))
    assert min(area.iou for area in judgement.discs) >= 0.97
    assert [area.right for area in judgement.discs] == [False, False]
    assert [area.nearest for area in judgement.discs] == ["sky blue", "red"]
    assert judgement.background.right
    assert judgement.colours_right is False
    expected = ciede2000(rgb_to_lab(COLOURS["red"]), rgb_to_lab(COLOURS["sky blue"]))
    assert judgement.discs[0].difference == pytest.approx(expected, abs=1e-9)


def test_a_near_colour_is_right_but_its_name_is_not():
    judgement = judged(one("white"), one("snow"))
    (area,) = judgement.discs
    assert 0 < area.difference < 10
    assert (area.right, area.name_right) == (True, False)
    assert (judgement.colours_right, judgement.names_right) == (True, False)


def test_a_disc_elsewhere_loses_its_area_and_its_colour():
    judgement = judged(one(x=26), one(x=70))
    assert judgement.discs[0].iou < 0.4
    assert judgement.discs[0].nearest == "navy"
    assert judgement.discs[0].right is False


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ("a photo of a dog", [False, False, False]),
        ("reddish circle with ivory background", [False, False, True]),
        ("red circle and tan circle and sky blue circle with ivory background", [False, False, True]),
        ("red circle and sky blue circle with nice background", [True, True, False]),
        ("Red circle and SkyBlue circle with ivory background", [True, True, True]),
        ("red circle with ivory background", [True, True, True]),
    ],
)
def test_prompts_that_do_not_tell_every_colour(prompt, known):
    judgement = judged(two(), prompt=prompt)
    areas = [*judgement.discs, judgement.background]
    assert [area.difference is not None for area in areas] == known
    assert (judgement.colours_right is None) == (not all(known))


def test_second_names_of_a_colour_count():
    judgement = judged(one("cyan", "dark gray"), prompt="aqua circle with dark grey background")
    assert judgement.colours_right
    assert judgement.discs[0].name_right
    assert judgement.background.name_right


def test_the_courses_score():
    iou, cosines = [1.0, 0.5, 0.0] + [0.9] * 9, [0.0, 1.0, 1.0] + [0.2] * 9
    assert evaluate.course_score(iou, cosines) == pytest.approx((0.5 + 9 * 0.9 * 0.6) / 10)
    assert evaluate.course_score(iou, cosines, best=None) == pytest.approx((0.5 + 0.5 + 0 + 9 * 0.9 * 0.6) / 12)


def test_the_summary_counts_what_is_known():
    judgements = [judged(two(), two("sky blue", "sky blue")), judged(one()), judged(one(), prompt="a dog")]
    figures = evaluate.summary(judgements, [0.2, 0.4, 0.6])
    assert figures["images"] == 3
    assert figures["iou"] == pytest.approx(np.mean([j.iou for j in judgements]))
    assert figures["disc_right"] == pytest.approx(2 / 3)
    assert figures["disc_name_right"] == pytest.approx(2 / 3)
    assert figures["background_right"] == 1
    assert figures["background_difference"] == 0
    assert figures["colours_right"] == figures["names_right"] == 0.5
    assert figures["cosine"] == pytest.approx(0.4)
    assert figures["score_best"] == figures["score_all"] > 0
    unknown = evaluate.summary(judgements[2:])
    assert unknown["colours_right"] is unknown["names_right"] is unknown["disc_right"] is None
    assert "score_best" not in unknown


@pytest.fixture
def drawn(tmp_path):
    """Six scenes in the course's layout, whose pictures are their targets, three times as large."""
    table = fill50k.main(fill50k.parse_arguments([str(tmp_path / "data"), "--count", "6", "--size", "64"]))
    out = tmp_path / "out"
    (out / "target").mkdir(parents=True)
    for path in (table.parent / "target").iterdir():
        with Image.open(path) as picture:
            picture.resize((192, 192), Image.Resampling.BILINEAR).save(out / "target" / path.name)
    return table, table.parent, out


def evaluated(*arguments):
    return evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))


def test_the_script_judges_a_folder(drawn, clip_folder, tmp_path, capsys):
    result = evaluated(*drawn, "--clip", clip_folder, "--json", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    figures = result["summary"]
    assert figures["images"] == 6
    assert figures["iou"] > 0.97
    assert figures["colours_right"] == figures["disc_name_right"] == figures["background_name_right"] == 1
    scores = [image["iou"] * (image["cosine"] + 1) / 2 for image in result["images"]]
    assert figures["score_all"] == pytest.approx(np.mean(scores))
    assert [len(image["discs"]) for image in result["images"]] == [1, 2] * 3
    printed = capsys.readouterr().out
    assert "target/5.png" in printed
    assert f"{figures['score_best']:.4f}" in printed


def test_without_a_clip_there_is_no_score(drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "CLIP", tmp_path / "absent")
    result = evaluated(*drawn)
    assert "score_all" not in result["summary"]
    assert "cosine" not in result["images"][0]


def test_a_missing_picture_is_named_or_left_out(drawn, tmp_path, capsys):
    table, _, out = drawn
    (out / "target" / "3.png").unlink()
    with pytest.raises(SystemExit) as caught:
        run(evaluate.main, evaluate.parse_arguments([str(path) for path in (*drawn, "--json", tmp_path / "f.json")]))
    assert caught.value.code == 2
    complaint = f"{table} line 4: {out / 'target' / '3.png'}: no such image"
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "f.json").exists()
    assert evaluated(*drawn, "--keep-going")["summary"]["images"] == 5
    assert f"skipped: {complaint}" in capsys.readouterr().err


def test_bad_folders_are_refused_before_anything_is_judged(drawn, tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        evaluated(*drawn, "--clip", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        evaluated(*drawn, "--json", tmp_path / "file" / "figures.json")
    assert capsys.readouterr().out.splitlines()[1:] == []


def imported(module: str, seen: set[str]) -> set[str]:
    """The project's modules that one of them imports, and those that they import."""
    path = Path(evaluate.__file__).parent.parent / f"{module.replace('.', '/')}.py"
    if module in seen or not path.is_file():
        return seen
    seen.add(module)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            imported(name, seen)
    return seen


def test_nothing_that_judges_helps_to_draw():
    used = imported("p3_controlnet.sample", set())
    assert "p3_controlnet.model" in used
    assert used.isdisjoint({"p3_controlnet.evaluate", "latent_diffusion.miniature.regions", "p3_controlnet.fill50k"})

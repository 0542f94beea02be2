"""Drawn circles judged: the targets themselves, and what goes wrong with pictures, prompts and folders."""

import json

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from common.data import read_image
from latent_diffusion import miniature
from latent_diffusion.clip import Clip
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import Circle, Scene, draw_hint, draw_target
from p3_controlnet import evaluate
from tests.programs import parse, run

SIZE = 96


def one(colour="gold", background="navy", x=48.0):
    return Scene((Circle(x, 50.0, 25.0, colour),), background)


def two(left="red", right="sky blue", background="ivory"):
    return Scene((Circle(28.0, 40.0, 18.0, left), Circle(72.0, 60.0, 17.0, right)), background)


def judge(hint, picture=None, prompt=None):
    """The picture of one scene judged by the hint and the prompt of another."""
    drawn = draw_target(picture or hint, SIZE)
    return evaluate.judge(draw_hint(hint, SIZE), drawn, hint.prompt if prompt is None else prompt)


@pytest.mark.parametrize("scene", [one(), one(x=30), one(x=5), two(), two("red", "red")])
def test_a_target_is_all_right(scene):
    judgement = judge(scene)
    assert judgement["cut"] == (scene.circles[0].x == 5)
    assert judgement["iou"] >= 0.98
    assert judgement["colours_right"] is True
    assert len(judgement["discs"]) == len(scene.circles)
    for disc, circle in zip(judgement["discs"], scene.circles):
        assert disc["iou"] >= 0.97
        assert (disc["named"], disc["nearest"], disc["difference"]) == (circle.colour, circle.colour, 0)
    assert (judgement["background"]["iou"], judgement["background"]["nearest"]) == (None, scene.background)


def test_colours_in_the_wrong_places_are_wrong_and_near_ones_right():
    judgement = judge(two("red", "sky blue"), two("sky blue", "red"))
    assert min(disc["iou"] for disc in judgement["discs"]) >= 0.97
    assert [(disc["nearest"], disc["right"]) for disc in judgement["discs"]] == [("sky blue", False), ("red", False)]
    assert (judgement["background"]["right"], judgement["colours_right"]) == (True, False)
    expected = ciede2000(rgb_to_lab(COLOURS["red"]), rgb_to_lab(COLOURS["sky blue"]))
    assert judgement["discs"][0]["difference"] == pytest.approx(expected, abs=1e-9)
    near = judge(one("white"), one("snow"))
    assert 0 < near["discs"][0]["difference"] < 10
    assert (near["colours_right"], near["discs"][0]["nearest"]) == (True, "snow")
    (elsewhere,) = judge(one(x=26), one(x=70))["discs"]
    assert elsewhere["iou"] < 0.4
    assert (elsewhere["nearest"], elsewhere["right"]) == ("navy", False)


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
    judgement = judge(two(), prompt=prompt)
    assert [area["difference"] is not None for area in (*judgement["discs"], judgement["background"])] == known
    assert (judgement["colours_right"] is None) == (not all(known))


def test_the_summary_has_the_courses_score_and_counts_what_is_known():
    images = [judge(two(), two("sky blue", "sky blue")), judge(one()), judge(one(), prompt="a dog")]
    figures = evaluate.summarise([image | {"cosine": cosine} for image, cosine in zip(images, [0.2, 0.4, 0.6])])
    assert figures["images"] == 3
    assert figures["iou"] == pytest.approx(np.mean([image["iou"] for image in images]))
    assert figures["disc_right"] == pytest.approx(2 / 3)
    assert (figures["background_right"], figures["background_difference"]) == (1, 0)
    assert figures["colours_right"] == 0.5
    assert figures["cosine"] == pytest.approx(0.4)
    assert figures["score_best"] == figures["score_all"] > 0
    unknown = evaluate.summarise(images[2:])
    assert unknown["colours_right"] is unknown["disc_right"] is None
    assert "score_best" not in unknown
    iou, cosines = [1.0, 0.5, 0.0] + [0.9] * 9, [0.0, 1.0, 1.0] + [0.2] * 9
    assert evaluate.course_score(iou, cosines) == pytest.approx((0.5 + 9 * 0.9 * 0.6) / 10)
    assert evaluate.course_score(iou, cosines, best=None) == pytest.approx((0.5 + 0.5 + 0 + 9 * 0.9 * 0.6) / 12)


@pytest.fixture
def drawn(circles, tmp_path):
    """What evaluate.py is given: six scenes, whose pictures are their targets, three times as large."""
    table, out = tmp_path / "six.json", tmp_path / "out"
    table.write_text("\n".join((circles / "prompt.json").read_text().splitlines()[:6]))
    (out / "target").mkdir(parents=True)
    for k in range(6):
        with Image.open(circles / "target" / f"{k}.png") as picture:
            picture.resize((192, 192), Image.Resampling.BILINEAR).save(out / "target" / f"{k}.png")
    return table, circles, out


def test_the_script_judges_a_folder(drawn, clip_folder, tmp_path, monkeypatch, capsys):
    result = run(evaluate, *drawn, "--clip", clip_folder, "--json", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    figures = result["summary"]
    assert figures["images"] == 6
    assert figures["iou"] > 0.97
    assert figures["colours_right"] == 1
    clip = Clip(clip_folder)
    for image in result["images"]:
        vector = clip.embed_images([read_image(drawn[2] / image["target"], 64)])
        assert image["cosine"] == pytest.approx((vector @ clip.embed_texts([image["prompt"]]).T).item(), abs=1e-5)
    scores = [image["iou"] * (image["cosine"] + 1) / 2 for image in result["images"]]
    assert figures["score_all"] == pytest.approx(np.mean(scores))
    cut = [image for image in result["images"] if image["cut"]]
    assert (result["cut"], result["whole"]["images"]) == (evaluate.summarise(cut), 6 - len(cut))
    assert f"{figures['score_best']:.4f}" in capsys.readouterr().out
    monkeypatch.setattr(miniature, "CLIP", tmp_path / "absent")
    assert "score_all" not in run(evaluate, *drawn)["summary"]


def test_a_missing_picture_is_named_or_left_out(drawn, refusal, tmp_path, capsys):
    table, _, out = drawn
    (out / "target" / "3.png").unlink()
    args = parse(evaluate, *drawn, "--json", tmp_path / "f.json")
    complaint = f"{table} line 4: {out / 'target' / '3.png'}: no such image"
    assert refusal(evaluate.main, args).startswith(complaint)
    assert not (tmp_path / "f.json").exists()
    assert run(evaluate, *drawn, "--keep-going")["summary"]["images"] == 5
    assert f"skipped: {complaint}" in capsys.readouterr().err


def test_bad_folders_are_refused_before_anything_is_judged(drawn, tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        run(evaluate, *drawn, "--clip", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(evaluate, *drawn, "--json", tmp_path / "file" / "figures.json")
    assert capsys.readouterr().out == ""

"""The circles tab draws what sample.py writes for the same outlines and prompt."""

import json

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from p3_controlnet import sample
from studio import circles
from studio.circles import Circles

PLACES = [(70, 62, 16), (33, 45, 22)]


def arguments(*flags):
    given = ("--device", "cpu", "--precision", "fp32", *flags)
    return sample.parse_arguments([str(flag) for flag in given])


@pytest.fixture
def page(pipeline_folder, controlnet_folder) -> Circles:
    args = arguments("--controlnet", controlnet_folder)
    args.base = pipeline_folder
    return Circles(args)


def draw(page, places=PLACES, **changes):
    values = {"prompt": "red circle", "strength": 0.5, "guidance_scale": 2.0, "method": "ddim", "steps": 3, "seed": 7}
    return page.draw(places, *(values | changes).values())


def test_the_picture_is_what_sample_writes(page, pipeline_folder, controlnet_folder, tmp_path, last, shrunk):
    # The outlines by hand: anti-aliased lines of two pixels about each edge.
    y, x = np.mgrid[:64, :64] + 0.5
    edges = [abs(np.hypot(x - 0.64 * cx, y - 0.64 * cy) - 0.64 * r) for cx, cy, r in PLACES]
    line = np.clip(1.5 - np.minimum(*edges), 0, 1)
    Image.fromarray(np.uint8(255 * line + 0.5)).convert("RGB").save(tmp_path / "hint.png")
    pair = {"source": "hint.png", "target": "picture.png", "prompt": "red circle"}
    (tmp_path / "prompt.json").write_text(json.dumps(pair))
    places = [tmp_path / "prompt.json", tmp_path, tmp_path / "out", pipeline_folder, "--controlnet", controlnet_folder]
    flags = ["--control-scale", 0.5, "--guidance-scale", 2, "--steps", 3, "--seed", 7]
    sample.main(arguments(*places, *flags))
    picture, _ = last(draw(page))
    expected = np.asarray(Image.open(tmp_path / "out" / "picture.png")).astype(int)
    assert np.abs(shrunk(picture, 64) - expected).max() <= 1
    without, _ = last(draw(page, strength=0))
    assert np.abs(shrunk(without, 64) - expected).max() > 10


def test_the_outlines_lie_where_they_should():
    pixels = np.asarray(circles.hint([(25, 50, 10), (75, 50, 20)]).convert("L"))
    side = circles.HINT_SIDE
    assert pixels.shape == (side, side)
    row = pixels[side // 2]
    bright = np.flatnonzero(row > 100) / side
    assert sorted({round(place, 2) for place in bright}) == [0.15, 0.35, 0.55, 0.95]


def test_the_sentence_names_colours_from_left_to_right():
    assert circles.sentence(PLACES, ["navy", "gold"], "pink") == "gold circle and navy circle with pink background"
    assert circles.sentence(PLACES[:1], ["navy"], "pink") == "navy circle with pink background"
    with pytest.raises(UserError, match=r"^colour is empty"):
        circles.sentence(PLACES, ["navy", None], "pink")


def test_the_nearest_circle_moves():
    assert circles.moved(PLACES, 60, 60) == [(60, 60, 16), (33, 45, 22)]
    assert circles.moved(PLACES, 0, 99) == [(70, 62, 16), (0, 99, 22)]
    with pytest.raises(UserError, match=r"^circle 2: x is empty"):
        circles.moved([(70, 62, 16), (None, 45, 22)], 0, 0)


def test_what_the_miniature_cannot_read():
    assert circles.remark("gold circle and navy circle with pink background") == ""
    assert "no colour called “golden”" in circles.remark("golden circle with navy background")
    assert "only read sentences" in circles.remark("a dog on a beach")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"places": [(101, 50, 10)]}, "^circle 1: x 101: choose from 0 to 100$"),
        ({"places": [(10, 50, 10), (10, 50, None)]}, "^circle 2: radius is empty"),
        ({"strength": 2.5}, r"^strength 2\.5"),
        ({"guidance_scale": None}, "^guidance is empty"),
        ({"method": "ddpm"}, "^sampler ddpm"),
        ({"steps": 101}, "^steps 101"),
        ({"seed": 0.5}, r"^seed 0\.5"),
    ],
)
def test_bad_input(page, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        next(draw(page, **changes))


@pytest.mark.parametrize("prompt", [None, "", "x" * 3000, "🟡\n🟣"])
def test_any_prompt_is_drawn(page, last, prompt, capsys):
    last(draw(page, prompt=prompt, steps=1))


def test_missing_weights(tmp_path, controlnet_folder):
    args = arguments("--controlnet", controlnet_folder)
    args.base = tmp_path / "none"
    with pytest.raises(UserError, match="no such file or folder"):
        next(draw(Circles(args)))
    args.controlnet = None
    with pytest.raises(UserError, match="no ControlNet for"):
        next(draw(Circles(args)))

"""Colours; scenes, their sentences and their drawings."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.colors import CSS4_COLORS
from PIL import Image, ImageDraw

from common.data import read_image
from common.runtime import seeded_generator
from latent_diffusion.miniature.colours import COLOURS, ciede2000, colour_named, rgb_to_lab
from latent_diffusion.miniature.scenes import (
    Circle,
    Scene,
    draw_hint,
    draw_target,
    held_out,
    random_scenes,
    read_prompt,
    roughen,
)


def test_colours_are_of_255_and_differences_broadcast():
    assert np.abs(rgb_to_lab([[255, 0, 0], [128, 128, 128]]) - [[53.24, 80.09, 67.20], [53.59, 0, 0]]).max() < 0.01
    # Sharma, Wu and Dalal 2005, table 1, rows 17 to 19.
    others = [[73, 25, -18], [61, -5, 29], [56, -27, -3]]
    assert np.abs(ciede2000([50, 2.5, 0], others) - [27.1492, 22.8977, 31.9030]).max() < 5.1e-5


def test_colours_are_all_of_css_once_each():
    css = {name: tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) for name, value in CSS4_COLORS.items()}
    second = {name for name in css if "grey" in name} | {"aqua", "fuchsia"}
    assert {name.replace(" ", ""): rgb for name, rgb in COLOURS.items()} == {
        name: rgb for name, rgb in css.items() if name not in second
    }
    assert len(set(COLOURS.values())) == len(COLOURS) == 139
    assert {"pale golden rod", "light sea green", "medium violet red", "old lace"} < set(COLOURS)


def test_every_css_name_is_known_however_it_is_spaced():
    assert colour_named("aqua") == COLOURS["cyan"]
    assert colour_named("Dark Slate Grey") == COLOURS["dark slate gray"]
    assert colour_named("palegolden rod") == COLOURS["pale golden rod"]
    assert [colour_named(name) for name in ("", "reddish", "#ff0000", "rgb(1,2,3)")] == [None] * 4


def scene(*colours, background="navy"):
    return Scene(tuple(Circle(20 + 30 * i, 30, 10, colour) for i, colour in enumerate(colours)), background)


@pytest.mark.parametrize(
    ("drawn", "prompt"),
    [
        (scene("pale golden rod", background="old lace"), "pale golden rod circle with old lace background"),
        (scene("gray", "gray", background="medium blue"), "gray circle with medium blue background"),
        (scene("red", "sky blue"), "red circle and sky blue circle with navy background"),
        (scene("red", "tan", "red"), "red circle and tan circle and red circle with navy background"),
    ],
)
def test_prompts_are_the_courses_sentences(drawn, prompt):
    assert drawn.prompt == prompt
    colours = [circle.colour for circle in drawn.circles]
    names, background = read_prompt(prompt)
    assert background == drawn.background
    assert names == colours or names * len(colours) == colours


@pytest.mark.parametrize("prompt", ["", "a dog", "red circle", "red square with blue background", "circle with blue"])
def test_other_sentences_tell_no_colours(prompt):
    assert read_prompt(prompt) is None


def test_one_pair_in_ten_is_held_out_on_every_machine():
    pairs = list(product(COLOURS, COLOURS))
    assert sum(held_out(*pair) for pair in pairs) / len(pairs) == pytest.approx(0.1, abs=0.01)
    assert any(held_out(a, b) != held_out(b, a) for a, b in pairs)
    # Python's own hash would differ from one process to the next.
    known = [background for background in COLOURS if held_out("dark salmon", background)]
    assert known == ["dark slate blue", "indigo", "ivory", "khaki", "light cyan"]


def cie76(one, two):
    return np.linalg.norm(rgb_to_lab(COLOURS[one]) - rgb_to_lab(COLOURS[two]))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("circles", [1, 2])
def test_random_scenes_keep_their_promises(circles, held):
    size, scenes = 96, list(random_scenes(150, 96, 7, (circles,), held))
    for drawn in scenes:
        assert len(drawn.circles) == circles
        for circle in drawn.circles:
            assert held_out(circle.colour, drawn.background) == held
            assert cie76(circle.colour, drawn.background) > 20
            assert 0 <= min(circle.x, circle.y) <= max(circle.x, circle.y) <= size
            assert 0.1 * size <= circle.radius <= (0.5 if circles == 1 else 0.3) * size
        if circles == 2:
            one, two = drawn.circles
            assert two.x - one.x > size / 10
            assert np.hypot(one.x - two.x, one.y - two.y) > one.radius + two.radius + 4
            assert one.colour == two.colour or cie76(one.colour, two.colour) > 20
    if circles == 2:
        same = np.mean([drawn.circles[0].colour == drawn.circles[1].colour for drawn in scenes])
        assert 0.1 < same < 0.45
    whole = [all(min(c.x, c.y, size - c.x, size - c.y) >= c.radius + 2 for c in drawn.circles) for drawn in scenes]
    assert 0.4 < np.mean(whole) < 0.8
    assert max(circle.radius for drawn in scenes for circle in drawn.circles) > (0.45 if circles == 1 else 0.28) * size
    widths = [drawn.line_width * 512 for drawn in scenes]
    assert (2 <= min(widths) < 2.2, 7.8 < max(widths) <= 8) == (True, True)
    assert 0.4 < np.mean([drawn.soft for drawn in scenes]) < 0.6


def test_a_scene_depends_on_seed_and_number_alone():
    long, short = (list(random_scenes(count, 64, 3, (1, 2), False)) for count in (9, 4))
    assert long[:4] == short
    assert long[1] != next(random_scenes(1, 64, 4, (1, 2), False))
    assert [len(drawn.circles) for drawn in short] == [1, 2, 1, 2]
    torch.manual_seed(99)
    assert list(random_scenes(4, 64, 3, (1, 2), False)) == short


def supersampled(drawn, size, paint, fine=16):
    """The scene drawn without anti-aliasing by Pillow, many times as large, then averaged: float (size, size, 3)."""
    picture = Image.new("RGB", (size * fine, size * fine))
    paint(ImageDraw.Draw(picture), fine)
    blocks = np.asarray(picture, dtype=np.float64).reshape(size, fine, size, fine, 3)
    return blocks.mean(axis=(1, 3))


@pytest.mark.parametrize("size", [64, 128])
def test_drawings_agree_with_supersampling(size):
    for drawn in random_scenes(4, size, 11, (1, 2), False):

        def box(circle, fine, grown):
            radius = circle.radius + grown
            corners = circle.x - radius, circle.y - radius, circle.x + radius, circle.y + radius
            return [corner * fine - 0.5 for corner in corners]

        def paint_target(pen, fine, drawn=drawn):
            pen.rectangle([0, 0, size * fine, size * fine], COLOURS[drawn.background])
            for circle in drawn.circles:
                pen.ellipse(box(circle, fine, 0), COLOURS[circle.colour])

        picture = draw_target(drawn, size)
        assert (picture.dtype, picture.shape) == (np.uint8, (size, size, 3))
        errors = np.abs(picture - supersampled(drawn, size, paint_target))
        assert errors.max() < 40  # of 255: a straight edge at a slant covers slightly less than its distance says
        assert errors.mean() < 1


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("width", [2, 8])
def test_hints_are_rings_of_the_line_s_width(width, soft):
    drawn = Scene((Circle(90, 250, 130, "red"),), "navy", width / 512, soft)
    picture = draw_hint(drawn, 512)
    assert (picture.dtype, picture.shape) == (np.uint8, (512, 512, 3))
    distance = np.hypot(*(np.indices((512, 512)) + 0.5 - np.array([250, 90])[:, None, None]))
    from_edge = np.abs(distance - 130)
    assert (picture[from_edge > width / 2 + 1.6] == 0).all()
    assert (picture[from_edge < width / 2 - 1.6] == 255).all()
    assert set(np.unique(picture)) == {0, 255} or soft
    lit = picture[..., 0].sum() / 255
    assert lit == pytest.approx((from_edge < width / 2).sum(), rel=0.05)


@pytest.mark.parametrize("flaw", [None, "broken", "jpeg"])
def test_small_hints_are_what_is_read_of_a_grader_s_file(flaw, tmp_path):
    for k, drawn in enumerate(random_scenes(4, 96, 12, (1, 2), False)):
        circles = [replace(c, x=c.x * 512 / 96, y=c.y * 512 / 96, radius=c.radius * 512 / 96) for c in drawn.circles]
        large = draw_hint(replace(drawn, circles=tuple(circles)), 512, flaw, seeded_generator(k))
        Image.fromarray(large).save(tmp_path / "0.png")
        small = draw_hint(drawn, 96, flaw, seeded_generator(k))
        assert np.abs(small.astype(int) - read_image(tmp_path / "0.png", 96)).max() <= 2


def test_flaws_spoil_a_little_of_the_lines():
    lost = []
    for k, drawn in enumerate(random_scenes(8, 512, 13, (1, 2), False)):
        plain = draw_hint(drawn, 512).astype(int)
        broken, noisy = (draw_hint(drawn, 512, flaw, seeded_generator(k)).astype(int) for flaw in ("broken", "jpeg"))
        lost.append(1 - broken.sum() / plain.sum())
        assert ((broken == plain) | (broken == 0)).all()
        assert 0 < np.abs(noisy - plain).mean() < 8
    assert 0.01 < np.mean(lost) < max(lost) < 0.4
    rough = [roughen(drawn, seeded_generator(k)) for k, drawn in enumerate(random_scenes(200, 64, 14, (1,), False))]
    assert {flaw for _, flaw in rough} == {None, "broken", "jpeg"}
    widths = [drawn.line_width * 512 for drawn, _ in rough]
    assert 1 <= min(widths) < 1.5
    assert 11 < max(widths) <= 12

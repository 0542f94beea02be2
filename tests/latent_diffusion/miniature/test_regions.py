"""Areas of images and hints against the discs that they were drawn from."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from latent_diffusion.miniature.depth import median_colour
from latent_diffusion.miniature.regions import (
    centre_iou,
    centre_region,
    circle_regions,
    deepest,
    grading_point,
    hint_regions,
    intersection_over_union,
    region_at,
)
from latent_diffusion.miniature.scenes import Circle, Scene, distances, draw_hint, draw_target, random_scenes


def inside(circle, size):
    return distances(circle, size) < circle.radius


def disc(x, y, radius, colour="gold", background="navy"):
    return Scene((Circle(x, y, radius, colour),), background)


@pytest.mark.parametrize("size", [96, 128, 400])
def test_a_hint_agrees_with_the_target_drawn_from_it(size):
    for drawn in random_scenes(6 if size == 400 else 40, size, 21, (1, 2), False):
        hint, target = draw_hint(drawn, size), draw_target(drawn, size)
        assert centre_iou(hint, target) >= 0.98
        discs, background = circle_regions(hint_regions(hint))
        assert len(discs) == len(drawn.circles)
        assert intersection_over_union(background, region_at(target, deepest(background))) >= 0.98
        for region, circle in zip(discs, drawn.circles):
            assert intersection_over_union(region, inside(circle, size)) >= 0.98
            assert intersection_over_union(region_at(target, deepest(region)), inside(circle, size)) >= 0.995


def test_the_centre_may_lie_in_disc_or_background():
    held = disc(60, 70, 30)
    aside = disc(30, 30, 20)
    np.testing.assert_array_equal(centre_region(draw_target(held, 128)), inside(held.circles[0], 128))
    np.testing.assert_array_equal(centre_region(draw_target(aside, 128)), ~inside(aside.circles[0], 128))


def test_moved_discs_lose_what_geometry_says():
    hint = draw_hint(disc(64, 64, 30), 128)
    shift, radius = 12, 30
    lens = 2 * radius**2 * np.arccos(shift / 2 / radius) - shift / 2 * np.sqrt(4 * radius**2 - shift**2)
    expected = lens / (2 * np.pi * radius**2 - lens)
    assert centre_iou(hint, draw_target(disc(76, 64, 30), 128)) == pytest.approx(expected, abs=0.01)
    assert centre_iou(hint, draw_target(disc(20, 20, 15), 128)) < 0.25
    assert centre_iou(hint, np.full((128, 128, 3), 77, np.uint8)) == pytest.approx(np.pi * 30**2 / 128**2, abs=0.01)


@pytest.mark.parametrize("radius", [29.6, 30, 30.4])
def test_an_outline_through_the_centre_is_no_coin_toss(radius):
    drawn = disc(64.5 - 30, 64.5, radius)
    hint = draw_hint(drawn, 128)
    assert hint[64, 64, 0] > 0
    row, column = grading_point(hint)
    assert 0 < np.hypot(row - 64, column - 64) < 8
    assert centre_iou(hint, draw_target(drawn, 128)) >= 0.98


def test_soft_and_noisy_pictures_keep_their_areas():
    drawn = disc(60, 66, 28, "light salmon", "light sky blue")
    soft = Image.fromarray(draw_target(drawn, 128)).filter(ImageFilter.GaussianBlur(1))
    noise = np.random.default_rng(0).normal(0, 2, (128, 128, 3))
    picture = (np.asarray(soft) + noise).clip(0, 255).astype(np.uint8)
    assert centre_iou(draw_hint(drawn, 128), picture) >= 0.98


def test_the_least_visible_colours_are_told_apart():
    drawn = disc(64, 64, 30, "white smoke", "gray")
    picture = draw_target(drawn, 128).astype(int)
    picture[inside(drawn.circles[0], 128)] = (146, 128, 128)  # CIE76 of gray: about 8, below what scenes have
    assert centre_region(picture.astype(np.uint8)).sum() > 8000
    picture[inside(drawn.circles[0], 128)] = (170, 128, 128)  # about 18
    region = centre_region(picture.astype(np.uint8))
    assert intersection_over_union(region, inside(drawn.circles[0], 128)) > 0.95


@pytest.mark.parametrize("width", [1, 2, 5])
def test_lines_of_any_width_without_anti_aliasing(width):
    size, circle = 128, Circle(64.0, 64.0, 40.0, "red")
    line = np.abs(distances(circle, size) - circle.radius) <= width / 2
    hint = np.repeat((line * 255).astype(np.uint8)[..., None], 3, axis=2)
    discs, _ = circle_regions(hint_regions(hint))
    assert len(discs) == 1
    assert intersection_over_union(discs[0], inside(circle, size)) >= 0.97


def test_double_lines_of_an_edge_detector_make_one_disc():
    one, two = (draw_hint(disc(64, 64, radius), 128) for radius in (38, 42))
    discs, background = circle_regions(hint_regions(np.maximum(one, two)))
    assert len(discs) == 1
    assert not (discs[0] & background).any()


def test_discs_go_from_left_to_right_and_may_leave_the_picture():
    scene = Scene((Circle(100, 30, 20, "red"), Circle(10, 90, 25, "tan")), "navy")
    discs, background = circle_regions(hint_regions(draw_hint(scene, 128)))
    assert [np.nonzero(region)[1].mean() < 64 for region in discs] == [True, False]
    for region, circle in zip(discs, reversed(scene.circles)):
        assert intersection_over_union(region, inside(circle, 128)) >= 0.97
    assert background[64, 64]


@pytest.mark.parametrize("light", [0, 255])
def test_a_hint_without_lines_or_without_gaps_is_one_area(light):
    hint = np.full((64, 64, 3), light, np.uint8)
    discs, background = circle_regions(hint_regions(hint))
    assert discs == []
    assert background.all()
    assert grading_point(hint) == (32, 32)
    assert centre_iou(hint, hint) == 1
    assert median_colour(hint, background).tolist() == [light] * 3


def test_colours_are_measured_away_from_the_rim():
    drawn = disc(64, 64, 20)
    target = draw_target(drawn, 128)
    region = inside(drawn.circles[0], 128)
    rim = region & (distances(drawn.circles[0], 128) > 17.5)
    target[rim] = 255
    target[60:64, 60:64] = 0  # a speck
    assert median_colour(target, region).tolist() == [255, 215, 0]
    tiny = np.zeros((128, 128), bool)
    tiny[5, 7] = True
    assert median_colour(target, tiny).tolist() == [0, 0, 128]

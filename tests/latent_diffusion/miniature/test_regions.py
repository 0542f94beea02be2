"""Areas of images and hints, and discs in drawings, against the scenes that they were drawn from."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from common.cli import UserError
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.regions import (
    centre_iou,
    circle_regions,
    concept_colour,
    deepest,
    disc_difference,
    find_discs,
    grading_point,
    hint_regions,
    intersection_over_union,
    is_cut,
    median_colour,
    region_at,
    shows_colours,
)
from latent_diffusion.miniature.scenes import Circle, Scene, distances, draw_hint, draw_target, random_scenes

WINE, PETROL = np.array([120, 8, 56]), np.array([0, 80, 120])
PALETTE = COLOURS | {"wine": tuple(WINE), "petrol": tuple(PETROL), "blend": tuple((WINE + PETROL) // 2)}
LEFT, RIGHT = (36.0, 50.0, 20.0), (92.0, 80.0, 16.0)


def draw_discs(*discs, background="light gray", size=128) -> np.ndarray:
    """A picture of discs, each its place and its colour's name."""
    scene = Scene(tuple(Circle(*place, name) for place, name in discs), background)
    return draw_target(scene, size, PALETTE)


def blur(picture: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """As a decoder draws it: edges soft, areas not quite even."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)), dtype=float)
    return np.clip(soft + np.random.default_rng(0).normal(0, noise, soft.shape), 0, 255).astype(np.uint8)


def from_to(one, other) -> float:
    return float(ciede2000(rgb_to_lab(one), rgb_to_lab(other)))


def inside(circle, size):
    return distances(circle, size) < circle.radius


def disc(x, y, radius, colour="gold", background="navy"):
    return Scene((Circle(x, y, radius, colour),), background)


# In a small picture the thinnest line is a faint row of pixels, whose middle is known less well.
@pytest.mark.parametrize(("size", "count", "least"), [(96, 40, 0.95), (128, 40, 0.97), (512, 12, 0.98)])
def test_a_hint_agrees_with_the_target_drawn_from_it(size, count, least):
    for drawn in random_scenes(count, size, 21, (1, 2), False):
        hint, target = draw_hint(drawn, size), draw_target(drawn, size)
        assert centre_iou(hint, target) >= least
        discs, background = circle_regions(hint_regions(hint))
        assert len(discs) == len(drawn.circles)
        assert not (background & np.logical_or.reduce(discs)).any()
        for region, circle in zip(discs, drawn.circles):
            assert intersection_over_union(region, inside(circle, size)) >= least
            assert intersection_over_union(region_at(target, deepest(region)), inside(circle, size)) >= 0.995
            beyond = circle.radius - min(circle.x, circle.y, size - circle.x, size - circle.y)
            assert abs(beyond) < 3 or is_cut(region) == (beyond > 0)


@pytest.mark.parametrize(
    ("circles", "parts"),
    [
        ([Circle(64, 40, 66, "red")], 3),  # two corners, and what lies below
        ([Circle(64, 64, 64, "red")], 4),
        ([Circle(36, 64, 66, "red"), Circle(115, 64, 10, "tan")], 3),
    ],
)
def test_a_background_that_discs_cut_in_pieces_is_one(circles, parts):
    drawn = Scene(tuple(circles), "navy")
    discs, background = circle_regions(hint_regions(draw_hint(drawn, 128)))
    truth = [inside(circle, 128) for circle in circles]
    assert ndimage.label(~np.logical_or.reduce(truth))[1] == parts
    assert len(discs) == len(circles)
    for region, true in zip([*discs, background], [*truth, ~np.logical_or.reduce(truth)]):
        assert intersection_over_union(region, true) >= 0.96


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


def test_the_least_visible_colours_are_told_apart():
    drawn = disc(64, 64, 30, "white smoke", "gray")
    picture = draw_target(drawn, 128).astype(int)
    picture[inside(drawn.circles[0], 128)] = (146, 128, 128)  # CIE76 of gray: about 8, below what scenes have
    assert region_at(picture.astype(np.uint8), (64, 64)).sum() > 8000
    picture[inside(drawn.circles[0], 128)] = (170, 128, 128)  # about 18
    region = region_at(picture.astype(np.uint8), (64, 64))
    assert intersection_over_union(region, inside(drawn.circles[0], 128)) > 0.95


@pytest.mark.parametrize("width", [1, 2, 5])
def test_lines_of_any_width_without_anti_aliasing(width):
    size, circle = 128, Circle(64.0, 64.0, 40.0, "red")
    line = np.abs(distances(circle, size) - circle.radius) <= width / 2
    hint = np.repeat((line * 255).astype(np.uint8)[..., None], 3, axis=2)
    discs, _ = circle_regions(hint_regions(hint))
    (found,) = discs
    assert intersection_over_union(found, inside(circle, size)) >= 0.97


def test_double_lines_of_an_edge_detector_make_one_disc():
    one, two = (draw_hint(disc(64, 64, radius), 128) for radius in (38, 42))
    discs, background = circle_regions(hint_regions(np.maximum(one, two)))
    assert len(discs) == 1
    assert not (discs[0] & background).any()


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


@pytest.mark.parametrize(
    ("make", "least"), [(lambda picture: picture, 0.95), (lambda picture: blur(picture, 1.5), 0.75)]
)
def test_discs_are_found_where_they_were_drawn(make, least):
    found = find_discs(make(draw_discs((RIGHT, "gold"), (LEFT, "wine"))))
    assert len(found) == 2
    for region, place in zip(found, (LEFT, RIGHT)):
        assert intersection_over_union(region, inside(Circle(*place, ""), 128)) > least


def test_an_even_picture_has_no_disc():
    even = draw_discs(background="gold")
    assert find_discs(even) == []
    assert disc_difference(even, WINE) == np.inf
    assert shows_colours(even, [np.array(COLOURS["gold"])]) == [False]
    specks = even.copy()
    specks[20:26, 30:36] = 0
    assert find_discs(specks) == []


def test_the_difference_is_that_of_the_disc_most_like_the_colour():
    picture = draw_discs((LEFT, "gold"), (RIGHT, "crimson"))
    assert disc_difference(picture, WINE) == pytest.approx(from_to(COLOURS["crimson"], WINE), abs=1e-9)
    assert disc_difference(picture, COLOURS["gold"]) == 0
    assert disc_difference(blur(picture, 1.5), WINE) == pytest.approx(from_to(COLOURS["crimson"], WINE), abs=1)
    # The background's colour is no disc's.
    assert disc_difference(draw_discs((LEFT, "gold"), background="crimson"), COLOURS["crimson"]) > 20


@pytest.mark.parametrize(
    ("discs", "background", "shown"),
    [
        ([(LEFT, "wine"), (RIGHT, "petrol")], "light gray", [True, True]),
        ([(LEFT, "petrol"), (RIGHT, "wine")], "gold", [True, True]),
        ([(LEFT, "wine"), (RIGHT, "wine")], "light gray", [True, False]),
        ([(LEFT, "petrol")], "light gray", [False, True]),
        ([(LEFT, "petrol")], "wine", [False, True]),
        ([(LEFT, "gold"), (RIGHT, "indigo")], "light gray", [False, False]),
        ([((45.0, 64.0, 18.0), "wine"), ((80.0, 64.0, 18.0), "petrol")], "white", [True, True]),
        ([(LEFT, "blend")], "white", [False, False]),
    ],
)
def test_which_concepts_a_picture_shows(discs, background, shown):
    picture = draw_discs(*discs, background=background)
    for image in (picture, blur(picture, 1.5)):
        assert shows_colours(image, [WINE, PETROL]) == shown
        assert shows_colours(image, [PETROL, WINE]) == shown[::-1]


def test_one_disc_does_not_pass_for_two_concepts_that_are_alike():
    alike = WINE + np.array([6, 4, 4])
    assert 0 < from_to(WINE, alike) < 5
    assert shows_colours(draw_discs((LEFT, "wine")), [WINE, alike]) == [True, False]
    assert shows_colours(draw_discs((LEFT, "wine")), [alike]) == [True]


def test_a_concept_s_colour_is_that_of_its_pictures():
    pictures = [draw_discs((LEFT, "wine"), ((92.0, 80.0, 8.0), "gold"), background=b) for b in ("white", "black")]
    assert concept_colour(pictures, "0").tolist() == WINE.tolist()
    noisy = concept_colour([blur(picture, 3) for picture in pictures], "0")
    assert from_to(noisy, WINE) < 2
    with pytest.raises(UserError, match="concept '0': not all its pictures show a disc"):
        concept_colour([*pictures, draw_discs(background="white")], "0")

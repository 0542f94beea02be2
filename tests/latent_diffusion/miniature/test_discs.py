"""Discs found again in drawings whose places and colours are known."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.discs import concept_colour, disc_difference, find_discs, shown_colours
from latent_diffusion.miniature.scenes import Circle, Scene, distances, draw_target

WINE, PETROL = np.array([120, 8, 56]), np.array([0, 80, 120])
PALETTE = COLOURS | {"wine": tuple(WINE), "petrol": tuple(PETROL)}
LEFT, RIGHT = (36.0, 50.0, 20.0), (92.0, 80.0, 16.0)


def drawn(*discs, background="light gray", size=128) -> np.ndarray:
    """A picture of discs, each its place and its colour's name."""
    scene = Scene(tuple(Circle(*place, name) for place, name in discs), background)
    return draw_target(scene, size, PALETTE)


def blurred(picture: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """As a decoder draws it: edges soft, areas not quite even."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)), dtype=float)
    return np.clip(soft + np.random.default_rng(0).normal(0, noise, soft.shape), 0, 255).astype(np.uint8)


def from_to(one, other) -> float:
    return float(ciede2000(rgb_to_lab(one), rgb_to_lab(other)))


@pytest.mark.parametrize(
    ("make", "least"), [(lambda picture: picture, 0.95), (lambda picture: blurred(picture, 1.5), 0.75)]
)
def test_discs_are_found_where_they_were_drawn(make, least):
    found = find_discs(make(drawn((RIGHT, "gold"), (LEFT, "wine"))))
    assert len(found) == 2
    for region, (x, y, radius) in zip(found, (LEFT, RIGHT)):
        true = distances(Circle(x, y, radius, ""), 128) < radius
        assert (region & true).sum() / (region | true).sum() > least
    assert found[0].sum() > found[1].sum()


def test_an_even_picture_has_no_disc():
    even = drawn(background="gold")
    assert find_discs(even) == []
    assert disc_difference(even, WINE) == np.inf
    assert shown_colours(even, [np.array(COLOURS["gold"])]) == [False]
    specks = even.copy()
    specks[20:26, 30:36] = 0
    assert find_discs(specks) == []


def test_the_difference_is_that_of_the_disc_most_like_the_colour():
    picture = drawn((LEFT, "gold"), (RIGHT, "crimson"))
    assert disc_difference(picture, WINE) == pytest.approx(from_to(COLOURS["crimson"], WINE), abs=1e-9)
    assert disc_difference(picture, COLOURS["gold"]) == 0
    assert disc_difference(blurred(picture, 1.5), WINE) == pytest.approx(from_to(COLOURS["crimson"], WINE), abs=1)
    # The background's colour is no disc's.
    assert disc_difference(drawn((LEFT, "gold"), background="crimson"), COLOURS["crimson"]) > 20


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
    ],
)
def test_which_concepts_a_picture_shows(discs, background, shown):
    picture = drawn(*discs, background=background)
    for image in (picture, blurred(picture, 1.5)):
        assert shown_colours(image, [WINE, PETROL]) == shown
        assert shown_colours(image, [PETROL, WINE]) == shown[::-1]


def test_a_blend_of_two_concepts_shows_neither():
    blend = tuple((WINE + PETROL) // 2)
    scene = Scene((Circle(*LEFT, "blend"),), "white")
    assert shown_colours(draw_target(scene, 128, COLOURS | {"blend": blend}), [WINE, PETROL]) == [False, False]


def test_one_disc_does_not_pass_for_two_concepts_that_are_alike():
    alike = WINE + np.array([6, 4, 4])
    assert 0 < from_to(WINE, alike) < 5
    assert shown_colours(drawn((LEFT, "wine")), [WINE, alike]) == [True, False]
    assert shown_colours(drawn((LEFT, "wine")), [alike]) == [True]


def test_a_disc_too_small_is_not_seen():
    assert shown_colours(drawn(((60.0, 60.0, 9.0), "wine")), [WINE]) == [True]
    assert shown_colours(drawn(((60.0, 60.0, 6.0), "wine")), [WINE]) == [False]


def test_a_concept_s_colour_is_that_of_its_pictures():
    pictures = [drawn((LEFT, "wine"), (((RIGHT[0], RIGHT[1], 8.0)), "gold"), background=b) for b in ("white", "black")]
    assert concept_colour(pictures).tolist() == WINE.tolist()
    noisy = concept_colour([blurred(picture, 3) for picture in pictures])
    assert from_to(noisy, WINE) < 2
    assert concept_colour([*pictures, drawn(background="white")]) is None

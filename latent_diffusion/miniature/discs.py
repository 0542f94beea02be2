"""Discs in drawn circles: where they are without a hint, and whether they have the colours that were asked for."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from latent_diffusion.miniature.colours import ciede2000, rgb_to_lab
from latent_diffusion.miniature.depth import BLUR, TOLERANCE, depth, median_colour

NEAR = 10.0  # CIEDE2000 up to which a colour is the one asked for
SEEN = 0.01  # of the picture that a disc must have; the smallest disc of two has 0.03


def find_discs(image: np.ndarray) -> list[np.ndarray]:
    """The areas unlike the background, the largest first; discs that touch are one area.

    The background's colour is the median of the picture's border, which no disc reaches.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        bool (H, W) each.
    """
    sides = image[:2], image[-2:], image[:, :2], image[:, -2:]
    background = rgb_to_lab(np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0))
    labels, _ = ndimage.label(np.linalg.norm(rgb_to_lab(image) - background, axis=-1) > TOLERANCE)
    sizes = np.bincount(labels.ravel())[1:]
    areas = [labels == k + 1 for k in np.argsort(-sizes, kind="stable") if sizes[k] > (2 * BLUR) ** 2]
    return [area for area in areas if depth(area).max() > BLUR]


def disc_difference(image: np.ndarray, colour: np.ndarray) -> float:
    """CIEDE2000 from a colour, sRGB (3,), to that of the disc that is most like it; endless without a disc.

    A disc's colour is the median of its pixels, its rim left out.
    """
    colours = [median_colour(image, area) for area in find_discs(image)]
    return min((float(ciede2000(rgb_to_lab(own), rgb_to_lab(colour))) for own in colours), default=np.inf)


def shown_colours(image: np.ndarray, colours: Sequence[np.ndarray]) -> list[bool]:
    """For each colour, sRGB (3,), whether the picture shows it: a connected area of a hundredth of the picture.

    Only pixels unlike the background count, and each only for the colour that it is most like, and only within
    CIEDE2000 10 of it. Discs that touch are told apart so, and one disc does not pass for two.
    """
    objects = np.logical_or.reduce([np.zeros(image.shape[:2], bool), *find_discs(image)])
    lab = rgb_to_lab(image)
    differences = np.stack([ciede2000(lab, rgb_to_lab(colour)) for colour in colours])
    shown = []
    for k, own in enumerate(differences):
        area = objects & (own <= NEAR) & (differences.argmin(axis=0) == k)
        sizes = np.bincount(ndimage.label(area)[0].ravel())[1:]
        shown.append(bool(sizes.max(initial=0) >= SEEN * area.size))
    return shown


def concept_colour(pictures: Sequence[np.ndarray]) -> np.ndarray | None:
    """The colour of the largest disc in pictures of a concept, sRGB (3,); None if any shows no disc."""
    found = [find_discs(picture) for picture in pictures]
    if not all(found):
        return None
    return np.median([median_colour(picture, discs[0]) for picture, discs in zip(pictures, found)], axis=0)

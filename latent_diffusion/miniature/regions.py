"""Which pixels belong together: areas of one colour in an image, and areas between the lines of a hint."""

import numpy as np
from scipy import ndimage

from latent_diffusion.miniature.colours import rgb_to_lab
from latent_diffusion.miniature.depth import BLUR, TOLERANCE, depth

LINE = 64  # of 255: from here on a hint's pixel is a line; anti-aliased lines stay closed


def centre(image: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel at the image's centre, where the course's grader puts its point."""
    return image.shape[0] // 2, image.shape[1] // 2


def around(labels: np.ndarray, point: tuple[int, int]) -> np.ndarray:
    """The pixels with the same label as one of them: bool (H, W)."""
    return labels == labels[point]


def from_nearest(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values (H, W, ...) where each pixel has that of the nearest known pixel; as they are if none is known."""
    if not known.any():
        return values
    rows, columns = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return values[rows, columns]


def region_at(image: np.ndarray, point: tuple[int, int]) -> np.ndarray:
    """The area of one colour that holds a point: a flood fill whose edge is put where the colours are halfway.

    Args:
        image: uint8 (H, W, 3).
        point: row and column.

    Returns:
        bool (H, W).
    """
    row, column = point
    patch = image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].reshape(-1, 3)
    colour = np.median(patch, axis=0)
    like = np.linalg.norm(rgb_to_lab(image) - rgb_to_lab(colour), axis=-1) < TOLERANCE
    like[point] = True
    area = around(ndimage.label(like)[0], point)
    # Anti-aliased and blurred pixels at the edge are like neither side; each goes to the side it resembles more: in
    # sRGB, where they were mixed.
    away = ndimage.distance_transform_edt(~area)
    image = image.astype(np.float64)
    beyond = from_nearest(image, away > BLUR)
    nearer = np.linalg.norm(image - colour, axis=-1) < np.linalg.norm(image - beyond, axis=-1)
    return area | ((away <= BLUR) & nearer)


def centre_region(image: np.ndarray) -> np.ndarray:
    """The area of one colour that holds the centre of an image, uint8 (H, W, 3): bool (H, W)."""
    return region_at(image, centre(image))


def hint_regions(hint: np.ndarray) -> np.ndarray:
    """The areas that a hint's lines part from each other; a line is split along its middle.

    Args:
        hint: uint8 (H, W, 3), white lines on black.

    Returns:
        int (H, W): a number from 1 for each area.
    """
    light = hint.max(axis=-1)
    # In a small picture a line's middle is wanted to a third of a pixel: an edge is a large part of a small disc.
    fine = 3 if max(light.shape) < 384 else 1
    light = ndimage.zoom(light.astype(np.float32), fine, order=1, mode="nearest", grid_mode=True)
    # Areas are joined by sides alone, so a line whose pixels touch at corners is closed.
    labels, _ = ndimage.label(light < LINE)
    # Faint pixels join the nearest area first: a line's middle is that of its bright pixels.
    for level in (128, 256):
        labels = np.where(light < level, from_nearest(labels, labels > 0), 0)
    return labels[fine // 2 :: fine, fine // 2 :: fine]


def grading_point(hint: np.ndarray) -> tuple[int, int]:
    """The hint's centre or, if a line is so near that the side it lies on is chance, the nearest pixel clear of lines.

    Args:
        hint: uint8 (H, W, 3).

    Returns:
        Row and column.
    """
    row, column = centre(hint)
    clear = depth(hint.max(axis=-1) < LINE) > BLUR
    positions = np.stack(np.indices(clear.shape), axis=-1)
    row, column = from_nearest(positions, clear)[row, column].tolist()
    return row, column


def centre_iou(hint: np.ndarray, image: np.ndarray) -> float:
    """How well an image's area at the centre agrees with the hint's, both uint8 (H, W, 3): 0 to 1."""
    point = grading_point(hint)
    return intersection_over_union(around(hint_regions(hint), point), region_at(image, point))


def circle_regions(labels: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The discs of a hint from left to right, and their background: the area with most of the picture's border.

    Slivers, as between the two lines that an edge detector makes of one, are no discs.

    Args:
        labels: from `hint_regions`.

    Returns:
        bool (H, W) each.
    """
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = np.bincount(border).argmax()
    areas = [labels == number for number in np.unique(labels) if number != background]
    discs = [area for area in areas if depth(area).max() > BLUR]
    return sorted(discs, key=lambda disc: np.nonzero(disc)[1].mean()), labels == background


def deepest(region: np.ndarray) -> tuple[int, int]:
    """Row and column of a pixel as far from the region's edge as any."""
    row, column = np.unravel_index(depth(region).argmax(), region.shape)
    return int(row), int(column)


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    """How well two regions agree: 0 to 1."""
    return float((a & b).sum() / max((a | b).sum(), 1))

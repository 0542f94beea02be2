"""Which pixels belong together: areas of one colour, discs, and what the lines of a hint enclose."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from common.cli import UserError
from latent_diffusion.miniature.colours import ciede2000, rgb_to_lab

NEAR = 10.0  # CIEDE2000: up to here a colour is the one that was asked for
TOLERANCE = 10.0  # CIE76: half of the least difference between two colours of a scene
BLUR = 3  # pixels beside an area that may be its blurred edge
RIM = 3 / 128  # of the side: a colour is not measured this near to an edge
SEEN = 0.01  # of the picture that a disc must cover; the smallest disc of two has 0.03
LINE = 64  # of 255: from here on a hint's pixel is a line; anti-aliased lines stay closed


def depth(region: np.ndarray) -> np.ndarray:
    """Distance of each pixel from the region's edge, infinite if it is the whole picture: float64 (H, W)."""
    return np.full(region.shape, np.inf) if region.all() else ndimage.distance_transform_edt(region)


def deepest(region: np.ndarray) -> tuple[int, int]:
    """Row and column of a pixel as far from the region's edge as any."""
    row, column = np.unravel_index(depth(region).argmax(), region.shape)
    return int(row), int(column)


def median_colour(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The median of each channel over a region without its rim: float64 (3,), 0 to 255."""
    inner = depth(region)
    return np.median(image[inner > min(RIM * len(image), inner.max() - 1)], axis=0)


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    """How well two regions agree: 0 to 1."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def take_nearest(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Give each pixel the value (H, W, ...) of the nearest known pixel; if none is known, all keep their own."""
    if not known.any():
        return values
    rows, columns = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return values[rows, columns]


def region_at(image: np.ndarray, point: tuple[int, int]) -> np.ndarray:
    """The area of one colour that holds a point, row and column, of an image, uint8 (H, W, 3): bool (H, W).

    It is a flood fill whose edge is put where the colours are halfway.
    """
    row, column = point
    patch = image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].reshape(-1, 3)
    colour = np.median(patch, axis=0)
    like = np.linalg.norm(rgb_to_lab(image) - rgb_to_lab(colour), axis=-1) < TOLERANCE
    like[point] = True
    labels, _ = ndimage.label(like)
    area = labels == labels[point]
    # Anti-aliased and blurred pixels at the edge are like neither side; each goes to the side it resembles more: in
    # sRGB, where they were mixed.
    away = ndimage.distance_transform_edt(~area)
    image = image.astype(np.float64)
    beyond = take_nearest(image, away > BLUR)
    nearer = np.linalg.norm(image - colour, axis=-1) < np.linalg.norm(image - beyond, axis=-1)
    return area | ((away <= BLUR) & nearer)


def hint_regions(hint: np.ndarray) -> np.ndarray:
    """The areas between the lines of a hint, uint8 (H, W, 3), white on black, as numbers from 1: int (H, W).

    A line is split along its middle.
    """
    light = hint.max(axis=-1).astype(np.float32)
    light *= 255 / max(light.max(), LINE)  # reduced to a small picture, thin lines are faint
    # In a small picture a line's middle is wanted to a third of a pixel: an edge is a large part of a small disc.
    fine = 3 if max(light.shape) < 384 else 1
    light = ndimage.zoom(light, fine, order=1, mode="nearest", grid_mode=True)
    # Areas are joined by sides alone, so a line whose pixels touch at corners is closed.
    labels, _ = ndimage.label(light < LINE)
    # Faint pixels join the nearest area first: a line's middle is that of its bright pixels.
    for level in (128, 256):
        labels = np.where(light < level, take_nearest(labels, labels > 0), 0)
    return labels[fine // 2 :: fine, fine // 2 :: fine]


def circle_regions(labels: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The discs among `hint_regions` from left to right, and their background: bool (H, W) each.

    The background is the area with most of the picture's border, and every other area at the border that an even
    number of lines parts from it: a disc that the border cuts may part the background in two. Slivers, as between the
    two lines that an edge detector makes of one, are no discs and go to their neighbours.
    """
    numbers = np.unique(labels)
    slivers = [number for number in numbers if depth(labels == number).max() <= BLUR]
    labels = take_nearest(labels, ~np.isin(labels, slivers))
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    lines = {int(np.bincount(border).argmax()): 0}  # of each area: how many lines part it from the background
    neighbours = touching(labels)
    queue = list(lines)
    for number in queue:
        for other in neighbours[number]:
            if other not in lines:
                lines[other] = lines[number] + 1
                queue.append(other)
    behind = [number for number in set(border.tolist()) if lines.get(number, 1) % 2 == 0]
    discs = [labels == number for number in np.unique(labels) if number not in behind]
    return sorted(discs, key=lambda disc: np.nonzero(disc)[1].mean()), np.isin(labels, behind)


def is_cut(region: np.ndarray) -> bool:
    """Whether a region, bool (H, W), reaches the picture's border, as a disc does that goes on beyond it."""
    return any(side.any() for side in (region[0], region[-1], region[:, 0], region[:, -1]))


def touching(labels: np.ndarray) -> dict[int, list[int]]:
    """The neighbours of each area, across a side longer than the corner at which lines cross."""
    pairs = Counter()
    for one, other in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        differ = one != other
        pairs.update(zip(one[differ].tolist(), other[differ].tolist()))
    neighbours = defaultdict(list)
    for (one, other), count in pairs.items():
        if count + pairs.get((other, one), 0) > BLUR:
            neighbours[one].append(other)
            neighbours[other].append(one)
    return neighbours


def grading_point(hint: np.ndarray) -> tuple[int, int]:
    """Row and column of a hint's centre, where the course's grader puts its point, or of the nearest pixel off lines.

    On a line, chance would decide which side the point belongs to.
    """
    clear = depth(hint.max(axis=-1) < LINE) > BLUR
    positions = np.stack(np.indices(clear.shape), axis=-1)
    row, column = take_nearest(positions, clear)[hint.shape[0] // 2, hint.shape[1] // 2].tolist()
    return row, column


def centre_iou(hint: np.ndarray, image: np.ndarray) -> float:
    """How well an image's area at the centre agrees with the hint's, both uint8 (H, W, 3): 0 to 1."""
    point, labels = grading_point(hint), hint_regions(hint)
    return intersection_over_union(labels == labels[point], region_at(image, point))


def find_discs(image: np.ndarray) -> list[np.ndarray]:
    """The areas of a picture, uint8 (H, W, 3), unlike its background, the largest first; discs that touch are one area.

    The background's colour is the median of the picture's border, which no disc reaches.
    """
    sides = image[:2], image[-2:], image[:, :2], image[:, -2:]
    background = rgb_to_lab(np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0))
    labels, _ = ndimage.label(np.linalg.norm(rgb_to_lab(image) - background, axis=-1) > TOLERANCE)
    sizes = np.bincount(labels.ravel())[1:]
    areas = [labels == k + 1 for k in np.argsort(-sizes, kind="stable") if sizes[k] > (2 * BLUR) ** 2]
    return [area for area in areas if depth(area).max() > BLUR]


def disc_difference(image: np.ndarray, colour: np.ndarray) -> float:
    """CIEDE2000 from a colour, sRGB (3,), to the most similar disc's; infinite if there is no disc."""
    colours = [median_colour(image, area) for area in find_discs(image)]
    return min((float(ciede2000(rgb_to_lab(own), rgb_to_lab(colour))) for own in colours), default=np.inf)


def shows_colours(image: np.ndarray, colours: Sequence[np.ndarray]) -> list[bool]:
    """For each colour, sRGB (3,), whether the picture shows it: a connected area of a hundredth of the picture.

    Only pixels unlike the background count, each for the colour that it is most like, and only where it is `NEAR`. So
    discs that touch are told apart, and one disc does not pass for two.
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


def concept_colour(pictures: Sequence[np.ndarray], concept: str) -> np.ndarray:
    """The colour of the largest disc in pictures of a concept, sRGB (3,); a `UserError` if any shows no disc."""
    found = [find_discs(picture) for picture in pictures]
    if not all(found):
        raise UserError(f"concept {concept!r}: not all its pictures show a disc; use --no-discs")
    return np.median([median_colour(picture, discs[0]) for picture, discs in zip(pictures, found)], axis=0)

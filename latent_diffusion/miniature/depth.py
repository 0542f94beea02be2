"""Regions of a picture: how deep they are, and what colour they have."""

import numpy as np
from scipy import ndimage

TOLERANCE = 10.0  # CIE76: half of the least difference between two colours of a scene
BLUR = 3  # pixels beside an area that may be its blurred edge
RIM = 3 / 128  # of the side: so near an edge a colour is not measured


def depth(region: np.ndarray) -> np.ndarray:
    """How far each pixel lies within the region; endless where the region is the whole picture: float64 (H, W)."""
    return np.full(region.shape, np.inf) if region.all() else ndimage.distance_transform_edt(region)


def median_colour(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The median of each channel over a region, its rim left out: float64 (3,), 0 to 255."""
    inner = depth(region)
    return np.median(image[inner > min(RIM * len(image), inner.max() - 1)], axis=0)

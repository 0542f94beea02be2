"""Are drawn digits copies? Every drawn image beside the training images that lie nearest to it."""

from typing import NamedTuple

import torch
from torch import Tensor

from common.data import LabelledImages, to_unit_range
from common.images import captioned, grid
from common.metrics import nearest
from p1_ddpm.judge import Judge, in_batches

SHOWN = 12


class Distances(NamedTuple):
    """Distances to the nearest training image: half are below the median, none below the smallest."""

    median: float
    smallest: float


def pixels(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) as rows, whose distance is the root mean square over pixels, in levels of 255."""
    rows = to_unit_range(images).flatten(1) * 127.5
    return rows / rows.shape[1] ** 0.5


def nearest_training(
    drawn: LabelledImages, held: LabelledImages, train: LabelledImages, judge: Judge, title: str
) -> tuple[Tensor, dict[tuple[str, str], Distances]]:
    """Look for each drawn image among the training images, by pixels and by the judge's features.

    Held-out images are the yardstick: a model that copies draws images that lie nearer to training images than those.
    It is a generous one for SVHN, whose neighbouring digits were cut from one photograph: a held-out digit often has
    trained-on ones beside it.

    Args:
        drawn: images to judge.
        held: real images that nothing was trained on, as many of each digit as drawn ones.
        train: what the model was trained on.
        judge: of that domain.
        title: of the picture.

    Returns:
        A picture, uint8 (3, height, width): drawn images from the nearest to the farthest (by pixels), their neighbours
        beneath; and the distances, by (measure, "drawn" or "held-out").
    """
    measures = {"pixels": pixels, "features": lambda images: in_batches(judge.features, images)}
    found, distances = {}, {}
    for name, measure in measures.items():
        references = measure(train.images)
        for who, images in (("drawn", drawn), ("held-out", held)):
            far, index = nearest(measure(images.images), references)
            found[name, who] = far, index
            distances[name, who] = Distances(far.median().item(), far.min().item())
    far, _ = found["pixels", "drawn"]
    shown = far.argsort()[torch.linspace(0, len(far) - 1, min(SHOWN, len(far))).long()]
    rows = [drawn.images[shown], *(train.images[found[name, "drawn"][1][shown]] for name in measures)]
    picture = captioned(
        grid(torch.cat(rows), len(shown), scale=3),
        ["drawn", "nearest by pixels", "nearest by features"],
        [f"{distance:.0f}" for distance in far[shown].tolist()],
        title,
    )
    return picture, distances

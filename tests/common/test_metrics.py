"""The distances between sets of features, against closed forms, scipy and plain loops."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch

from common.cli import UserError
from common.metrics import AT_ONCE, frechet_distance, kernel_distance, nearest, precision_recall


def cloud(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return scale * torch.randn(count, width, generator=generator) @ mixing + shift


@pytest.mark.parametrize(("count", "other"), [(400, 300), (50, 37)])
def test_frechet_distance_equals_the_formula_with_scipys_square_root(count, other):
    first, second = cloud(count, 12, 0), cloud(other, 12, 1, 1.3, 0.4)
    a, b = first.double().numpy(), second.double().numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_survives_fewer_images_than_features():
    # Two points and three: the covariances have ranks 1 and 2, and tr (C1 C2)^(1/2) = sqrt(c1' C2 c1) by hand.
    first = torch.zeros(2, 6)
    first[1, 0] = 2.0  # covariance 2 in the first direction
    second = torch.zeros(3, 6)
    second[1, 0], second[2, 1] = 3.0, 3.0  # means (1, 1), covariance [[3, -1.5], [-1.5, 3]]
    expected = 0 + 1 + 2 + 6 - 2 * math.sqrt(2 * 3)
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-12)


def test_kernel_distance_equals_explicit_loops():
    first, second = cloud(7, 5, 5).double(), cloud(9, 5, 6, shift=0.3).double()

    def mean(one, other):
        kernels = [(float(x @ y) / 5 + 1) ** 3 for x in one for y in other if x is not y]
        return sum(kernels) / len(kernels)

    a, b = list(first), list(second)
    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-12)


def loops(real, drawn, k):
    """Precision and recall exactly as the paper's equations read, point by point."""

    def radius(point, others):
        return sorted(math.dist(point, other) for other in others)[k - 1]

    def inside(point, points):
        return any(
            math.dist(point, centre) <= radius(centre, points[:i] + points[i + 1 :]) for i, centre in enumerate(points)
        )

    real, drawn = real.tolist(), drawn.tolist()
    return sum(inside(p, real) for p in drawn) / len(drawn), sum(inside(p, drawn) for p in real) / len(real)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_the_definition(k):
    real, drawn = cloud(60, 4, 7).double(), cloud(45, 4, 8, 0.7, 0.5).double()
    expected = loops(real, drawn, k)
    assert precision_recall(real, drawn, k) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1


def test_copies_lie_inside_even_where_real_images_are_repeated():
    repeated = cloud(4, 64, 9).repeat(5, 1) * 1000
    assert precision_recall(repeated, repeated[:8], 3) == (1.0, 1.0)


def test_nearest_equals_a_search_in_float64():
    references, queries = cloud(200, 30, 10), cloud(AT_ONCE + 40, 30, 11)
    full = (queries.double()[:, None] - references.double()[None]).norm(dim=2)
    found, index = nearest(queries, references)
    assert torch.equal(index, full.argmin(dim=1))
    assert (found - full.min(dim=1).values).abs().max() < 1e-5


@pytest.mark.parametrize("number", [frechet_distance, kernel_distance, partial(precision_recall, k=3)])
def test_what_cannot_be_compared_is_refused(number):
    with pytest.raises(UserError, match="1 images: comparing two sets takes at least"):
        number(torch.zeros(1, 3), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="both must be"):
        number(torch.zeros(9, 3), torch.zeros(9, 4))

"""The distances between sets of features, against closed forms, scipy and plain loops."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from common.cli import UserError
from common.metrics import frechet_distance, kernel_distance, nearest, precision_recall


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


def test_frechet_distance_of_scaled_and_moved_points_has_a_closed_form():
    # y = a x + m has covariance a^2 C, so the distance is |mean(y) - mean(x)|^2 + (a - 1)^2 tr C.
    x = cloud(200, 8, 2).double()
    y = 3 * x + 0.5
    trace = x.var(dim=0).sum()
    expected = (y.mean(0) - x.mean(0)).square().sum() + 4 * trace
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)


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

    def kernel(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    def mean(pairs):
        pairs = list(pairs)
        return sum(pairs) / len(pairs)

    expected = (
        mean(kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j)
        + mean(kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j)
        - 2 * mean(kernel(x, y) for x in first for y in second)
    )
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased():
    # Small samples of one distribution: the mean over many pairs is zero within its standard error.
    values = [kernel_distance(*torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(s))) for s in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    far = [kernel_distance(torch.randn(10, 3, generator=torch.Generator().manual_seed(s)), 2 + torch.randn(10, 3,
           generator=torch.Generator().manual_seed(s + 1))) for s in range(20)]  # fmt: skip
    assert min(far) > max(values)


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


def line(*points: float) -> torch.Tensor:
    return torch.tensor(points)[:, None]


def test_precision_and_recall_tell_few_kinds_from_bad_images():
    both = line(0, 1, 2, 3, 100, 101, 102, 103)
    left = line(0.5, 1.5, 2.5, 3.5)
    assert precision_recall(both, left, k=1) == (1.0, 0.5)  # only one of the two kinds is drawn, but well
    assert precision_recall(left, both, k=1) == (0.5, 1.0)  # everything is covered, half of what is drawn is not real
    assert precision_recall(both, both + 50, k=1) == (0.0, 0.0)


def test_copies_lie_inside_even_where_real_images_are_repeated():
    repeated = cloud(4, 64, 9).repeat(5, 1) * 1000
    assert precision_recall(repeated, repeated[:8]) == (1.0, 1.0)


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_nearest_equals_a_search_in_float64(chunk):
    references, queries = cloud(200, 30, 10), cloud(40, 30, 11)
    full = (queries.double()[:, None] - references.double()[None]).norm(dim=2)
    found, index = nearest(queries, references, chunk)
    assert torch.equal(index, full.argmin(dim=1))
    assert (found - full.min(dim=1).values).abs().max() < 1e-5


@pytest.mark.parametrize("number", [frechet_distance, kernel_distance, precision_recall])
def test_what_cannot_be_compared_is_refused(number):
    with pytest.raises(UserError, match="1 images: comparing two sets takes at least"):
        number(torch.zeros(1, 3), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="both must be"):
        number(torch.zeros(9, 3), torch.zeros(9, 4))

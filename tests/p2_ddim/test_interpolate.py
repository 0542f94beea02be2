"""Slerp and lerp against their closed forms."""

import math

import numpy as np
import pytest
import torch

from common.cli import UserError
from p2_ddim.noise import STRIP, Noise, between, lerp, slerp

ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def gaussian(seed):
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_slerp_turns_at_constant_speed():
    """In the plane the answer is known: the unit vector at the angle alpha theta."""
    for theta in (1e-9, 1e-3, 1.0, 3.0, math.pi - 1e-3):
        a, b = (torch.tensor([math.cos(x), math.sin(x)], dtype=torch.float64) for x in (0, theta))
        for alpha in ALPHAS:
            expected = torch.tensor([math.cos(alpha * theta), math.sin(alpha * theta)], dtype=torch.float64)
            assert (slerp(a, b, alpha) - expected).abs().max() < 1e-12


def test_both_are_the_papers_formulas_over_all_values_together():
    a, b = gaussian(1).numpy().astype(np.float64), gaussian(2).numpy().astype(np.float64)
    theta = np.arccos((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    for alpha in ALPHAS:
        expected = (np.sin((1 - alpha) * theta) * a + np.sin(alpha * theta) * b) / np.sin(theta)
        ends = torch.from_numpy(a), torch.from_numpy(b)
        assert np.abs(slerp(*ends, alpha).numpy() - expected).max() < 1e-12
        assert np.abs(lerp(*ends, alpha).numpy() - ((1 - alpha) * a + alpha * b)).max() < 1e-12


@pytest.mark.parametrize("method", [slerp, lerp])
@pytest.mark.parametrize("share", [0, 1, 2, -3, -1 + 1e-7, None])
def test_ends_are_exact_and_the_way_is_finite(method, share):
    """Between a noise and another, none at all, itself, a parallel and opposite ones."""
    a = gaussian(1)
    b = gaussian(2) if share is None else share * a
    way = torch.stack([method(a, b, k / 50) for k in range(51)])
    assert torch.equal(way[0], a)
    assert torch.equal(way[-1], b)
    assert way.dtype == torch.float32
    assert way.isfinite().all()
    assert (way[1:] - way[:-1]).flatten(1).norm(dim=1).max() < 0.1 * max(a.norm(), b.norm())  # no jumps


def test_the_strip_has_eleven_points_of_noises_of_one_size():
    assert pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]) == list(STRIP)
    path = between(Noise("00", gaussian(1)), Noise("01", gaussian(2)), "slerp")
    assert len({noise.name for noise in path}) == 11
    with pytest.raises(UserError, match="00 and 01"):
        between(Noise("00", torch.zeros(3, 8, 8)), Noise("01", torch.zeros(3, 8, 16)), "lerp")

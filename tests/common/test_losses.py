"""The training loss against its formula, written out for one image at a time."""

import numpy as np
import pytest
import torch

from common.losses import diffusion_loss
from common.schedule import NoiseSchedule


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_weighted_squared_error(prediction, gamma):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 300, 700, 999])
    ours = diffusion_loss(
        lambda xt, t: torch.tanh(xt) + t[:, None, None, None] / 1000,
        {"x0": x0, "eps": eps, "t": t}, NoiseSchedule(), prediction, gamma,
    )  # fmt: skip
    a_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    total = 0.0
    for k in range(4):
        a = a_bar[t[k]]
        clean, noise = x0[k].numpy(), eps[k].numpy()
        output = np.tanh(np.sqrt(a) * clean + np.sqrt(1 - a) * noise) + int(t[k]) / 1000
        target = {"eps": noise, "x0": clean, "v": np.sqrt(a) * noise - np.sqrt(1 - a) * clean}[prediction]
        snr = a / (1 - a)
        weight = min(snr, gamma) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction] if gamma else 1
        total += weight * np.square(output - target).mean() / 4
    assert ours.item() == pytest.approx(total, rel=1e-5)

"""The training loss against its formula, written out for one image at a time."""

import numpy as np
import pytest
import torch

from common.losses import diffusion_loss
from common.schedule import PREDICTIONS, NoiseSchedule


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=dtype)
    return {"x0": x0, "eps": eps, "t": torch.tensor([0, 300, 700, 999])}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_weighted_squared_error(prediction, gamma):
    batch = make_batch()
    ours = diffusion_loss(
        lambda xt, t: torch.tanh(xt) + t[:, None, None, None] / 1000, batch, NoiseSchedule(), prediction, gamma
    )
    a_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    total = 0.0
    for clean, noise, t in zip(batch["x0"].numpy(), batch["eps"].numpy(), batch["t"].tolist()):
        a = a_bar[t]
        output = np.tanh(np.sqrt(a) * clean + np.sqrt(1 - a) * noise) + t / 1000
        target = {"eps": noise, "x0": clean, "v": np.sqrt(a) * noise - np.sqrt(1 - a) * clean}[prediction]
        snr = a / (1 - a)
        weight = min(snr, gamma) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction] if gamma else 1
        total += weight * np.square(output - target).mean() / 4
    assert ours.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss_and_sees_all_else_in_the_batch(prediction):
    schedule = NoiseSchedule("cosine")
    batch = make_batch(torch.float32) | {"labels": torch.arange(4), "hint": torch.zeros(4, 1)}

    def perfect(xt, t, labels, hint):
        assert torch.equal(xt, schedule.add_noise(batch["x0"], batch["eps"], t))
        assert labels is batch["labels"]
        assert hint is batch["hint"]
        return schedule.target(batch["x0"], batch["eps"], t, prediction)

    assert diffusion_loss(perfect, batch, schedule, prediction, 5.0) == 0


def test_the_loss_of_a_bf16_network_is_fp32():
    scale = torch.ones((), requires_grad=True)
    loss = diffusion_loss(lambda xt, t: (xt * scale).bfloat16(), make_batch(torch.float32), NoiseSchedule(), "eps", 5.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert scale.grad.isfinite()
    assert scale.grad != 0

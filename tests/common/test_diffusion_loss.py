"""The training loss against its definition."""

import numpy as np
import pytest
import torch

from common.schedule import PREDICTIONS, NoiseSchedule
from common.training import diffusion_loss

SCHEDULE = NoiseSchedule("cosine")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 3, 4, 4, generator=generator)
    t = torch.randint(0, 1000, (64,), generator=generator)
    return {"x0": x0, "eps": eps, "t": t, "labels": t % 10, "hint": x0[:, :1]}


def zeros(xt, t, **condition):
    return torch.zeros_like(xt)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss(batch, prediction):
    def perfect(xt, t, labels, hint):
        assert torch.equal(xt, SCHEDULE.add_noise(batch["x0"], batch["eps"], batch["t"]))
        assert t is batch["t"]
        assert labels is batch["labels"]
        assert hint is batch["hint"]
        return SCHEDULE.target(batch["x0"], batch["eps"], t, prediction)

    assert diffusion_loss(perfect, batch, SCHEDULE, prediction, 5.0) == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0, 5.0])
def test_the_loss_is_the_weighted_squared_error(batch, prediction, gamma):
    target = SCHEDULE.target(batch["x0"], batch["eps"], batch["t"], prediction).double().numpy()
    alpha_bar = SCHEDULE.alphas_cumprod.numpy()[batch["t"]]
    snr = alpha_bar / (1 - alpha_bar)
    divisor = {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
    weights = np.minimum(snr, gamma) / divisor if gamma else 1
    expected = np.mean(weights * (target.reshape(64, -1) ** 2).mean(1))
    assert diffusion_loss(zeros, batch, SCHEDULE, prediction, gamma).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_the_network_in_fp32(batch):
    scale = torch.ones((), requires_grad=True)
    loss = diffusion_loss(lambda xt, t, **condition: (xt * scale).bfloat16(), batch, SCHEDULE, "eps", 5.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert scale.grad.isfinite()
    assert scale.grad != 0

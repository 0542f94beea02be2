"""The schedule against diffusers' schedulers and against closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from common.cli import UserError
from common.schedule import PREDICTIONS, SCHEDULES, NoiseSchedule


def diffusers_scheduler(name, kind=DDPMScheduler, **options):
    theirs = {"cosine": "squaredcos_cap_v2", "scaled-linear": "scaled_linear"}.get(name, name)
    return kind(beta_schedule=theirs, beta_start=1e-4, beta_end=2e-2, **options)


def worst(a, b):
    return (a.double() - b.double()).abs().max().item()


def example(dtype=torch.float64, count=1000):
    """Clean images, noise, and every timestep."""
    generator = torch.Generator().manual_seed(3)
    x0 = torch.rand(count, 3, 2, 2, generator=generator, dtype=dtype) * 2 - 1
    eps = torch.randn(count, 3, 2, 2, generator=generator, dtype=dtype)
    return x0, eps, torch.arange(1000)[-count:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_are_diffusers(name):
    ours, theirs = NoiseSchedule(name), diffusers_scheduler(name)
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == torch.float64
    # diffusers computes in float32: half a unit in the last place of 0.999, and of a product of 1000 factors.
    assert worst(ours.betas, theirs.betas) < 1e-7
    assert worst(ours.alphas_cumprod, theirs.alphas_cumprod) < 2e-6


def test_alphas_cumprod_in_closed_form():
    cosine = NoiseSchedule("cosine").alphas_cumprod
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    assert worst(cosine[:999], torch.tensor(f[1:1000], dtype=torch.float64) / f[0]) < 1e-14
    assert cosine[999] == pytest.approx(cosine[998].item() * 0.001, rel=1e-12)  # the cap of 0.999
    linear = NoiseSchedule("linear", T=4, beta_start=0.1, beta_end=0.4)
    assert worst(linear.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504, 0.3024], dtype=torch.float64)) < 1e-15


@pytest.mark.parametrize("name", SCHEDULES)
def test_noising_and_velocity_are_diffusers(name):
    x0, eps, t = example(torch.float32)
    ours, theirs = NoiseSchedule(name), diffusers_scheduler(name)
    assert worst(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t)) < 1e-5
    assert worst(ours.target(x0, eps, t, "v"), theirs.get_velocity(x0, eps, t)) < 1e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_outputs_convert_back_to_x0_and_eps(name, prediction):
    x0, eps, t = example()
    schedule = NoiseSchedule(name)
    xt = schedule.add_noise(x0, eps, t)
    found_x0, found_eps = schedule.x0_and_eps(schedule.target(x0, eps, t, prediction), xt, t, prediction)
    # Where hardly any signal is left, x0 from eps loses as many digits as sqrt(a-bar) is small.
    lost = 1 / schedule.alphas_cumprod.min().sqrt().item()
    assert worst(found_x0, x0) < 1e-14 * lost
    assert worst(found_eps, eps) < 1e-12


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x0(prediction):
    """Whatever is predicted, weight times squared error is min(SNR, gamma) times the squared error of x0."""
    x0, eps, t = example(count=995)
    schedule = NoiseSchedule("linear")
    xt, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t, prediction)
    output = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    implied_x0, _ = schedule.x0_and_eps(output, xt, t, prediction)
    weighted = schedule.min_snr_weight(t, prediction, 5.0) * (output - target).square().mean((1, 2, 3))
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    expected = snr.clamp(max=5.0) * (implied_x0 - x0).square().mean((1, 2, 3))
    assert (weighted / expected - 1).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 50, 333, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_diffusers(spacing, steps):
    for offset in (0, 1) if spacing == "leading" and steps < 1000 else (0,):
        theirs = diffusers_scheduler("linear", DDIMScheduler, timestep_spacing=spacing, steps_offset=offset)
        theirs.set_timesteps(steps)
        assert NoiseSchedule("linear").timesteps(steps, spacing, offset) == theirs.timesteps.tolist()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: NoiseSchedule("quadratic"), "quadratic"),
        (lambda: NoiseSchedule().x0_and_eps(*torch.zeros(2, 1, 1), torch.tensor([0]), "score"), "score"),
        (lambda: NoiseSchedule().timesteps(0), "--steps 0: must be from 1 to 1000"),
        (lambda: NoiseSchedule().timesteps(1001), "--steps 1001: must be from 1 to 1000"),
        (lambda: NoiseSchedule().timesteps(10, "logarithmic"), "logarithmic"),
        (lambda: NoiseSchedule().timesteps(1000, "leading"), "--steps 1000 --timestep-spacing leading: leaves"),
        (lambda: NoiseSchedule().timesteps(10, "leading", -1), "leaves the timesteps 0 to 999"),
    ],
)
def test_what_is_unknown_or_impossible_is_refused(make, complaint):
    with pytest.raises((ValueError, UserError), match=complaint):
        make()

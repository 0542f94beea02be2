"""The noise schedule: how much of the image is left at each timestep, and what follows from that.

Notation (Ho et al. 2020): `alphas_cumprod[t]` is a-bar_t = prod_{s<=t} (1 - beta_s), and
q(xt | x0) = N(sqrt(a-bar_t) x0, (1 - a-bar_t) I), equation 4. Timesteps count from 0.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError, check

SCHEDULES = ("linear", "cosine", "sigmoid", "scaled-linear")
PREDICTIONS = ("eps", "x0", "v")
SPACINGS = ("leading", "trailing", "linspace")


def make_betas(name: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    """The T variances beta_t of a named schedule, float64.

    linear: Ho et al. 2020, section 4. cosine: Nichol and Dhariwal 2021, equation 17, capped at 0.999.
    sigmoid: betas follow a sigmoid over [-6, 6] (Xu et al. 2022).
    scaled-linear: the square of a line (Rombach et al. 2022).
    """
    if name == "linear":
        return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    if name == "scaled-linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    if name == "sigmoid":
        return torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start
    if name == "cosine":
        steps = torch.arange(T + 1, dtype=torch.float64) / T
        alphas_cumprod = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule {name!r}: choose from {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule of T timesteps: `betas` and `alphas_cumprod`, float64 (T,) on the CPU."""

    name: str = "linear"  # one of `SCHEDULES`
    T: int = 1000
    beta_start: float = 1e-4  # cosine has no use for the first and last beta
    beta_end: float = 2e-2

    def __post_init__(self):
        betas = make_betas(self.name, self.T, self.beta_start, self.beta_end)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1 - betas, dim=0))

    def coefficients(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """sqrt(a-bar_t) and sqrt(1 - a-bar_t), shaped (N, 1, ...) in the dtype and on the device of `like`.

        For one timestep they are plain numbers, for which a GPU need not wait.
        """
        if isinstance(t, int):
            a = float(self.alphas_cumprod[t])
            return math.sqrt(a), math.sqrt(1 - a)
        # The square roots are taken in float64, and cast before they move: not every device has float64.
        roots = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        signal, noise = (root.to(like.dtype).to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1)) for root in roots)
        return signal, noise

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """xt = sqrt(a-bar_t) x0 + sqrt(1 - a-bar_t) eps (Ho et al. 2020, equation 4).

        Args:
            x0: clean images (N, ...) in [-1, 1].
            eps: standard normal noise, shaped as x0.
            t: timesteps (N,), integers in [0, T).
        """
        signal, noise = self.coefficients(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, prediction: str) -> Tensor:
        """What a network of this prediction type should output: eps, x0, or v (Salimans and Ho 2022, appendix D)."""
        if prediction == "v":
            signal, noise = self.coefficients(t, x0)
            return signal * eps - noise * x0
        return {"eps": eps, "x0": x0}[prediction]

    def x0_and_eps(self, output: Tensor, xt: Tensor, t: Tensor | int, prediction: str) -> tuple[Tensor, Tensor]:
        """The clean image and the noise that a network output implies, both shaped as xt; t is (N,), or one for all.

        v prediction: x0 = sqrt(a-bar) xt - sqrt(1 - a-bar) v, eps = sqrt(1 - a-bar) xt + sqrt(a-bar) v.
        """
        signal, noise = self.coefficients(t, xt)
        if prediction == "v":
            return signal * xt - noise * output, noise * xt + signal * output
        if prediction == "x0":
            return output, (xt - signal * output) / noise
        if prediction == "eps":
            return (xt - noise * output) / signal, output
        raise ValueError(f"prediction {prediction!r}: choose from {', '.join(PREDICTIONS)}")

    def min_snr_weight(self, t: Tensor, prediction: str, gamma: float) -> Tensor:
        """Loss weights min(SNR, gamma), over what the prediction already weighs (Hang et al. 2023, section 3.4)."""
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        already = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[prediction]
        return (snr.clamp(max=gamma) / already).float().to(t.device)[t]

    def timesteps(self, steps: int, spacing: str = "trailing", offset: int = 1) -> list[int]:
        """The timesteps a sampler visits, from noisy to clean (Lin et al. 2024, table 2).

        Args:
            steps: how many, 1..T.
            spacing: leading (0, r, 2r, ... reversed, plus `offset`), trailing (T-1, T-1-r, ...) or linspace.
            offset: added to every leading timestep; 1 as in Stable Diffusion, 981, 961, ..., 1 for 50 steps of 1000.

        A `UserError` for steps out of range, or an offset that leaves the schedule.
        """
        check("steps", steps, 1 <= steps <= self.T, f"from 1 to {self.T}")
        if spacing == "leading":
            visited = np.arange(steps)[::-1] * (self.T // steps) + offset
        elif spacing == "trailing":
            visited = np.round(np.arange(self.T, 0, -self.T / steps))[:steps] - 1
        elif spacing == "linspace":
            visited = np.linspace(0, self.T - 1, steps).round()[::-1]
        else:
            raise ValueError(f"spacing {spacing!r}: choose from {', '.join(SPACINGS)}")
        if visited.min() < 0 or visited.max() >= self.T:
            raise UserError(f"--steps {steps} --timestep-spacing {spacing}: leaves the timesteps 0 to {self.T - 1}")
        return [int(t) for t in visited]

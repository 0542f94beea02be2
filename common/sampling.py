"""Drawing images: guidance, one reverse step per method, and the loop that yields every xt.

    xt at t  --network-->  output  --schedule-->  (x0, eps)  --method-->  xt at the next, smaller t

All arithmetic on xt is in xt's own dtype (fp32 or fp64) with coefficients computed in float64, whatever precision the
network runs in.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.runtime import seeded_generator
from common.schedule import NoiseSchedule

METHODS = ("ddpm", "ddim", "dpm-solver++")
Denoiser = Callable[[Tensor, int], Tensor]


class ImageNoise:
    """Standard normal noise in which every image draws from a generator of its own.

    So an image's pixels depend on its key alone: not on the batch size, the order, or the number of processes.

    Args:
        keys: one key of whole numbers an image, such as (seed, index).
    """

    def __init__(self, keys: Sequence[tuple[int, ...]]):
        self.generators = [seeded_generator(*key) for key in keys]

    def draw(self, shape: Sequence[int], device: torch.device | str = "cpu", dtype=torch.float32) -> Tensor:
        """The next noise of every image: (len(keys), *shape), drawn on the CPU, then moved."""
        drawn = [torch.randn(*shape, generator=generator, dtype=dtype) for generator in self.generators]
        return torch.stack(drawn).to(device)


def guided(
    network: Callable[..., Tensor],
    condition: Mapping[str, Tensor],
    null_condition: Mapping[str, Tensor],
    guidance_scale: float,
    interval: tuple[float, float] = (0, math.inf),
) -> Denoiser:
    """Classifier-free guidance as a function of (xt, t) (Ho and Salimans 2022, equation 6).

    output = uncond + s (cond - uncond), with s = `guidance_scale`; the paper's w is s - 1. The formula is linear, so it
    means the same for eps, x0 and v. Both halves go through the network in one batch; at s = 1, and outside the
    interval, only the conditional half is computed.

    Args:
        network: called as network(xt, t, **condition).
        condition: tensors with first dimension N, one row an image.
        null_condition: the same, for "no condition".
        guidance_scale: s; 1 turns guidance off.
        interval: guide only at timesteps low <= t <= high (Kynkaanniemi et al. 2024).
    """
    both = {name: torch.cat([null_condition[name], rows]) for name, rows in condition.items()}

    def denoise(xt: Tensor, t: int) -> Tensor:
        if guidance_scale == 1 or not interval[0] <= t <= interval[1]:
            return network(xt, torch.full((len(xt),), t, device=xt.device), **condition)
        uncond, cond = network(torch.cat([xt, xt]), torch.full((2 * len(xt),), t, device=xt.device), **both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return denoise


def ddim_step(
    xt: Tensor, x0: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_next: float, eta: float, noise: Tensor | None
) -> Tensor:
    """One step of DDIM (Song et al. 2021, equations 12 and 16).

    | here             | paper                                                          |
    | alpha_bar        | alpha_t (DDPM's a-bar_t)                                       |
    | alpha_bar_next   | alpha_{t-1}                                                    |
    | sigma            | sigma_t = eta sqrt((1-a')/(1-a)) sqrt(1 - a/a')                |
    | towards_xt * eps | "direction pointing to xt"                                     |

    With eta = 1 this is DDPM's ancestral step with the posterior variance (Ho et al. 2020, equation 7).

    Args:
        xt: images at the present timestep (N, ...); only its dtype and shape matter, x0 and eps carry the rest.
        x0: predicted clean images.
        eps: predicted noise.
        alpha_bar: alphas_cumprod at the present timestep.
        alpha_bar_next: alphas_cumprod at the next, less noisy one.
        eta: 0 for deterministic DDIM, 1 for DDPM.
        noise: standard normal, shaped as xt; may be None where sigma is 0.
    """
    sigma = eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
    towards_xt = math.sqrt(max(0.0, 1 - alpha_bar_next - sigma**2))
    following = math.sqrt(alpha_bar_next) * x0.to(xt.dtype) + towards_xt * eps.to(xt.dtype)
    return following + sigma * noise if sigma > 0 else following


def dpm_solver_step(xt: Tensor, x0: Tensor, previous_x0: Tensor | None, alpha_bars: Sequence[float]) -> Tensor:
    """One step of DPM-Solver++(2M), data prediction (Lu et al. 2022b, algorithm 2).

    Args:
        xt: images at the present timestep (N, ...).
        x0: predicted clean images at the present timestep.
        previous_x0: the same from the step before, or None for a first-order step.
        alpha_bars: alphas_cumprod at the timestep before, the present one and the next; the next may be 1 (clean).
    """
    before, now, following = (0.5 * (math.log(a) - math.log1p(-a)) if a < 1 else math.inf for a in alpha_bars)
    h = following - now  # step in half log-SNR, the paper's lambda
    data = x0
    if previous_x0 is not None:
        r = (now - before) / h
        data = x0 + (x0 - previous_x0) / (2 * r)
    shrink = math.sqrt((1 - alpha_bars[2]) / (1 - alpha_bars[1]))
    return shrink * xt - math.sqrt(alpha_bars[2]) * math.expm1(-h) * data


class Step(NamedTuple):
    """One reverse step: xt after it, the x0 predicted in it, and the timestep it started from."""

    t: int
    xt: Tensor
    x0: Tensor


def reverse_process(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    xt: Tensor,
    timesteps: Sequence[int],
    prediction: str,
    method: str = "ddim",
    eta: float = 0.0,
    noise: ImageNoise | None = None,
    clip_x0: bool = True,
    use_clipped_model_output: bool = False,
    final_alpha: str = "one",
) -> Iterator[Step]:
    """Walk from noise to image, yielding every step; the last one's xt is the result.

    Args:
        denoise: network output from (xt, t); see `guided`.
        schedule: the schedule that the network was trained with.
        xt: starting noise (N, C, H, W), float32 or float64.
        timesteps: decreasing; see `NoiseSchedule.timesteps`.
        prediction: what the network predicts: eps, x0 or v.
        method: "ddpm" (ancestral sampling, Ho et al. 2020, algorithm 2), "ddim", or "dpm-solver++".
        eta: DDIM's share of fresh noise; "ddpm" is 1 by definition and "dpm-solver++" has none.
        noise: where fresh noise comes from; needed when eta > 0.
        clip_x0: clamp the predicted x0 to [-1, 1]. "ddpm" then derives eps again from the clamped x0, as its
            posterior mean is defined by (x0, xt); "ddim" keeps the network's eps.
        use_clipped_model_output: "ddim" derives eps again too. With strong guidance it must: an eps that belongs to
            an x0 far out of range drives xt away from what the network knows, the more so the more steps there are.
        final_alpha: what alphas_cumprod becomes after the last timestep: "one", or "first" for alphas_cumprod[0].

    Raises:
        ValueError: unknown method, or fresh noise is needed and none given.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose from {', '.join(METHODS)}")
    eta = {"ddpm": 1.0, "ddim": eta}.get(method, 0.0)
    if eta > 0 and noise is None:
        raise ValueError("eta above 0 needs a source of noise")
    last = 1.0 if final_alpha == "one" else float(schedule.alphas_cumprod[0])
    alpha_bars = [*(float(schedule.alphas_cumprod[t]) for t in timesteps), last]
    previous_x0 = None
    for i, t in enumerate(timesteps):
        now, following = alpha_bars[i], alpha_bars[i + 1]
        output = denoise(xt, t).to(xt.dtype)
        x0, eps = schedule.x0_and_eps(output, xt, t, prediction)
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            if method == "ddpm" or use_clipped_model_output:
                eps = (xt - math.sqrt(now) * x0) / math.sqrt(1 - now)
        if method == "dpm-solver++":
            # The step to a clean image is first-order: half log-SNR is infinite there.
            second_order = previous_x0 if following < 1 else None
            xt = dpm_solver_step(xt, x0, second_order, (alpha_bars[max(i - 1, 0)], now, following))
            previous_x0 = x0
        else:
            fresh = noise.draw(xt.shape[1:], xt.device, xt.dtype) if eta > 0 and following < 1 else None
            xt = ddim_step(xt, x0, eps, now, following, eta, fresh)
        yield Step(t, xt, x0)


def draw(*args, **options) -> Tensor:
    """The result of `reverse_process`, without its way there."""
    return deque(reverse_process(*args, **options), maxlen=1).pop().xt

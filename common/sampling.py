"""From noise to images: the denoiser, one reverse step per method, the loop over steps, and drawing in batches.

    network --Denoiser--> (xt, t) -> (x0, eps) --reverse_process--> every xt --draw_in_batches--> images

All arithmetic on xt is in xt's own dtype (fp32 or fp64) with coefficients computed in float64, whatever precision the
network runs in.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from common.cli import Progress, UserError
from common.runtime import seeded_generator
from common.schedule import NoiseSchedule

METHODS = ("ddpm", "ddim", "dpm-solver++")
Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Item = TypeVar("Item")


class ImageNoise:
    """Standard normal noise in which every image draws from a generator of its own, keyed by, say, (seed, index).

    So an image's pixels depend on its key alone: not on the batch size, the order, or the number of processes.
    """

    def __init__(self, keys: Sequence[tuple[int, ...]]):
        self.generators = [seeded_generator(*key) for key in keys]

    def draw(self, shape: Sequence[int], device: torch.device | str = "cpu", dtype=torch.float32) -> Tensor:
        """The next noise of every image: (len(keys), *shape), drawn on the CPU, then moved."""
        drawn = [torch.randn(*shape, generator=generator, dtype=dtype) for generator in self.generators]
        return torch.stack(drawn).to(device)


@dataclass
class Denoiser:
    """A network as a function (xt, t) -> (x0, eps): guidance, prediction type and clipping are inside.

    Classifier-free guidance (Ho and Salimans 2022, equation 6) is output = uncond + s (cond - uncond), with
    s = `guidance_scale`; the paper's w is s - 1. The formula is linear, so it means the same for eps, x0 and v. Both
    halves go through the network in one batch; at s = 1, and outside the interval, only the conditional half is
    computed. No gradients are kept.

    Args:
        network: called as network(xt, t, **condition), with t an int64 tensor (N,).
        schedule: that the network was trained with.
        prediction: what the network predicts: eps, x0 or v.
        condition: tensors with first dimension N, one row an image.
        null_condition: the same rows for "no condition"; needed for guidance.
        guidance_scale: s; 1 turns guidance off.
        guidance_interval: guide only at timesteps low <= t <= high (Kynkaanniemi et al. 2024).
        clip_x0: clamp the predicted x0 to [-1, 1].
        use_clipped_model_output: derive eps again from the clamped x0. DDPM's posterior mean is defined by (x0, xt), so
            "ddpm" needs it; so does DDIM with strong guidance, where an eps that belongs to an x0 far out of range
            drives xt away from what the network knows. Named as in diffusers' `DDIMScheduler.step`.
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    prediction: str
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    null_condition: Mapping[str, Tensor] | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0, math.inf)
    clip_x0: bool = True
    use_clipped_model_output: bool = False

    def __post_init__(self):
        if self.guidance_scale != 1:
            self.both = {name: torch.cat([self.null_condition[name], rows]) for name, rows in self.condition.items()}

    @torch.no_grad()
    def __call__(self, xt: Tensor, t: int) -> tuple[Tensor, Tensor]:
        x0, eps = self.schedule.x0_and_eps(self.guided(xt, t).to(xt.dtype), xt, t, self.prediction)
        if self.clip_x0:
            x0 = x0.clamp(-1, 1)
            if self.use_clipped_model_output:
                signal, noise = self.schedule.coefficients(t, xt)
                eps = (xt - signal * x0) / noise
        return x0, eps

    def guided(self, xt: Tensor, t: int) -> Tensor:
        """The network's output at one timestep, with guidance where it is on."""
        low, high = self.guidance_interval
        if self.guidance_scale == 1 or not low <= t <= high:
            return self.network(xt, torch.full((len(xt),), t, device=xt.device), **self.condition)
        timesteps = torch.full((2 * len(xt),), t, device=xt.device)
        uncond, cond = self.network(torch.cat([xt, xt]), timesteps, **self.both).chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


def ddim_step(
    x0: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_next: float, eta: float, noise: Tensor | None
) -> Tensor:
    """One step of DDIM (Song et al. 2021, equations 12 and 16).

    | here             | paper                                                          |
    | alpha_bar        | alpha_t (DDPM's a-bar_t)                                       |
    | alpha_bar_next   | alpha_{t-1}                                                    |
    | sigma            | sigma_t = eta sqrt((1-a')/(1-a)) sqrt(1 - a/a')                |
    | towards_xt * eps | "direction pointing to xt"                                     |

    With eta = 1 this is DDPM's ancestral step with the posterior variance (Ho et al. 2020, equation 7).

    Args:
        x0: predicted clean images (N, ...).
        eps: predicted noise, of the same shape.
        alpha_bar: alphas_cumprod at the present timestep.
        alpha_bar_next: the same at the next, less noisy one.
        eta: 0 for deterministic DDIM, 1 for DDPM.
        noise: standard normal, of the same shape; may be None where sigma is 0.
    """
    sigma = eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
    towards_xt = math.sqrt(max(0.0, 1 - alpha_bar_next - sigma**2))
    following = math.sqrt(alpha_bar_next) * x0 + towards_xt * eps
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
    denoise: Denoise,
    schedule: NoiseSchedule,
    xt: Tensor,
    timesteps: Sequence[int],
    method: str = "ddim",
    eta: float = 0.0,
    noise: ImageNoise | None = None,
    final_alpha: str = "one",
) -> Iterator[Step]:
    """Walk from noise to image, yielding every step; the last one's xt is the result.

    Args:
        denoise: see `Denoiser`.
        schedule: that the network was trained with.
        xt: starting noise (N, C, H, W), float32 or float64.
        timesteps: decreasing; see `NoiseSchedule.timesteps`.
        method: "ddpm" (ancestral sampling, Ho et al. 2020, algorithm 2), "ddim", or "dpm-solver++".
        eta: DDIM's share of fresh noise; "ddpm" is 1 by definition and "dpm-solver++" has none.
        noise: where fresh noise comes from; needed when eta > 0.
        final_alpha: what alphas_cumprod becomes after the last timestep: "one", or "first" for alphas_cumprod[0].

    A `ValueError` if the method is unknown, or fresh noise is needed and none given.
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
        x0, eps = denoise(xt, t)
        if method == "dpm-solver++":
            # The step to a clean image is first-order: half log-SNR is infinite there.
            second_order = previous_x0 if following < 1 else None
            xt = dpm_solver_step(xt, x0, second_order, (alpha_bars[max(i - 1, 0)], now, following))
            previous_x0 = x0
        else:
            fresh = noise.draw(xt.shape[1:], xt.device, xt.dtype) if eta > 0 and following < 1 else None
            xt = ddim_step(x0, eps, now, following, eta, fresh)
        yield Step(t, xt, x0)


def draw(*args, **options) -> Tensor:
    """The result of `reverse_process`, without the steps that lead there."""
    return deque(reverse_process(*args, **options), maxlen=1).pop().xt


class NotFinite(UserError):
    """Drawn images have NaN or infinite values: half precision overflowed, or the weights are broken."""


def check_finite(images: Tensor, names: Iterable[object], precision: str) -> None:
    """Raise `NotFinite`, naming the first, unless all images (N, ...) are finite; `precision` is the network's."""
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    if broken := [name for name, whole in zip(names, finite) if not whole]:
        mend = "choose bf16 or fp32" if precision == "fp16" else "name other weights"
        raise NotFinite(f"{broken[0]}: drawn in {precision} it is not finite; {mend}")


def draw_in_batches(
    items: Sequence[Item],
    walk: Callable[[Sequence[Item]], Iterable[Step]],
    finish: Callable[[Sequence[Item], Tensor], Tensor],
    *,
    batch_size: int,
    steps: int,
    to_fp32: Callable[[], bool] | None = None,
) -> Iterator[tuple[Item, Tensor]]:
    """Draw items in batches that fit the memory; yields each with its image, in their order.

    A batch that does not fit the GPU's memory is halved, and so are those after it. A batch whose images are not finite
    is drawn again if `to_fp32` could change the networks' precision.

    Args:
        walk: from a batch of items to the steps of its reverse process.
        finish: from a batch and its last xt to the images, (N, ...); raises `NotFinite`, see `check_finite`.
        steps: of the reverse process, for the progress.
        to_fp32: turns the networks to fp32; returns False if they are in fp32 already.

    A `UserError` if a single image does not fit the memory, or is not finite.
    """
    start = 0
    with Progress(len(items) * steps, "images", "step") as phase:
        while start < len(items):
            batch, began = items[start : start + batch_size], phase.n
            try:
                for step in walk(batch):  # noqa: B007, the last one is wanted
                    phase.update(len(batch))
                images = finish(batch, step.xt)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    mend = "choose --precision bf16 or fp16, or smaller images"
                    raise UserError(f"one image does not fit the GPU's memory; {mend}") from None
                batch_size = len(batch) // 2
                print(f"warning: the GPU's memory is full; going on with --batch-size {batch_size}", file=sys.stderr)
            except NotFinite:
                if to_fp32 is None or not to_fp32():
                    raise
                print("warning: half precision overflows; drawing in fp32 from here on", file=sys.stderr)
            else:
                yield from zip(batch, images)
                start += len(batch)
                continue
            phase.update(began - phase.n)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

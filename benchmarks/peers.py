"""What ours is timed against: plain algorithms, and diffusers' schedulers and pipeline with our weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
)
from torch import Tensor, nn

from common.images import to_uint8
from common.sampling import Denoiser, ImageNoise, draw
from common.schedule import NoiseSchedule
from p1_ddpm.digits import Digit, joint_label
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from p1_ddpm.sample import DigitOptions, DigitSampler
from p2_ddim.make_examples import diffusers_scheduler
from p2_ddim.model import COURSE, FaceUNet
from p2_ddim.noise import Noise
from p2_ddim.sampler import DDIMOptions, FaceSampler
from p3_controlnet.sampler import HintOptions, Item

# As many parameters and operations as the network of the public solutions, Pearce's: 25 million, 11 GFLOP a pass.
PLAIN_NETWORK = ContextUNetConfig(patch_size=1, widths=(128, 576), blocks=(1, 1), middle_attention=False)


@torch.no_grad()
def draw_by_diffusers(denoiser: Denoiser, scheduler: SchedulerMixin, xt: Tensor, steps: int) -> Tensor:
    """The last xt of diffusers' scheduler around a network of ours, guidance included."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        xt = scheduler.step(denoiser.guided(xt, int(t)).float(), t, xt).prev_sample
    return xt


def digit_denoiser(sampler: DigitSampler, digits: Sequence[Digit], guidance_scale: float) -> Denoiser:
    """The sampler's network with guidance for these digits, unclipped as diffusers has it."""
    classes = [joint_label(sampler.domains, digit.domain, digit.label) for digit in digits]
    labels = torch.tensor(classes, device=sampler.device)
    told, null = {"labels": labels}, {"labels": torch.full_like(labels, sampler.model.null_label)}
    prediction = sampler.about["prediction"]
    return Denoiser(sampler.predict, sampler.schedule, prediction, told, null, guidance_scale, clip_x0=False)


def draw_digits(sampler: DigitSampler, digits: Sequence[Digit], options: DigitOptions) -> Tensor:
    """What diffusers' DPM-Solver++ draws with the sampler's network and noise: uint8 (N, 3, H, W)."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    denoiser, xt = digit_denoiser(sampler, digits, options.guidance_scale), sampler.noise(digits, options)
    return to_uint8(draw_by_diffusers(denoiser, scheduler, xt, options.steps).clamp(-1, 1))


def prepare_plain_digits(images: int, steps: int, device: torch.device) -> Callable[[], Tensor]:
    """Work: the first of 1000 ancestral steps (Ho et al. 2020, algorithm 2) in fp32, with `PLAIN_NETWORK`."""
    model, schedule = ContextUNet(PLAIN_NETWORK).eval().to(device), NoiseSchedule("linear")
    labels, noise = torch.arange(images, device=device), ImageNoise([(0, k) for k in range(images)])
    null = {"labels": torch.full_like(labels, model.null_label)}
    denoise = Denoiser(model, schedule, "eps", {"labels": labels}, null, guidance_scale=3.0)
    xt, timesteps = noise.draw((3, 28, 28), device), range(999, 999 - steps, -1)
    return lambda: draw(denoise, schedule, xt, timesteps, "ddpm", noise=noise)


class StandIn(nn.Module):
    """A random face network beside the exact denoiser of Gaussian data with deviation 1/2; it predicts eps.

    A random network alone is no denoiser: every step would multiply rounding errors, until two correct samplers differ.
    Layers that start at zero are drawn anew.
    """

    def __init__(self, network: FaceUNet):
        super().__init__()
        self.network, self.config = network, network.config
        self.alphas_cumprod = NoiseSchedule(**COURSE["schedule"]).alphas_cumprod
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.any():
                module.reset_parameters()

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod.to(xt)[t][:, None, None, None]
        return (1 - a).sqrt() / (a / 4 + 1 - a) * xt + 0.3 * self.network(xt, t)


def draw_faces(sampler: FaceSampler, noises: Sequence[Noise], options: DDIMOptions) -> Tensor:
    """What diffusers' DDIM draws with the sampler's network: uint8 (N, 3, H, W)."""
    denoiser = Denoiser(sampler.predict, sampler.schedule, sampler.about["prediction"])
    scheduler, xt = diffusers_scheduler(sampler.about), sampler.noise(noises, options)
    return to_uint8(draw_by_diffusers(denoiser, scheduler, xt, options.steps), "minmax")


@torch.no_grad()
def draw_plainly(network: nn.Module, about: Mapping[str, Any], xt: Tensor, steps: int) -> Tensor:
    """DDIM as it is usually written, for one noise (1, C, H, W): fp32, the usual layout. Returns a uint8 image."""
    xt = xt.to(next(network.parameters()).device)
    alphas_cumprod = NoiseSchedule(**about["schedule"]).alphas_cumprod.float().tolist()
    timesteps = list(range(1, 1001, 1000 // steps))[:steps][::-1]
    for t, following in zip(timesteps, [*timesteps[1:], 0]):
        a, a_next = alphas_cumprod[t], alphas_cumprod[following]
        output = network(xt, torch.tensor([t], device=xt.device))
        if about["prediction"] == "v":
            x0, eps = a**0.5 * xt - (1 - a) ** 0.5 * output, (1 - a) ** 0.5 * xt + a**0.5 * output
        else:
            x0, eps = (xt - (1 - a) ** 0.5 * output) / a**0.5, output
        xt = a_next**0.5 * x0.clamp(-1, 1) + (1 - a_next) ** 0.5 * eps
    return to_uint8(xt, "minmax")


def load_pipeline(base: Path, controlnet: Path, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """diffusers' ControlNet pipeline of the same weights: from items, noise and options to uint8 (N, 3, H, W)."""
    network = ControlNetModel.from_pretrained(controlnet, dtype=dtype)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base, controlnet=network, dtype=dtype, safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    # Our steps from noise to picture.
    steps = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **steps)

    @torch.no_grad()
    def draw_pictures(items: Sequence[Item], noise: Tensor, options: HintOptions) -> Tensor:
        pairs, hints = zip(*items)
        output = pipeline(
            [pair.prompt for pair in pairs],
            image=torch.stack(hints).to(device) / 255,
            latents=noise.to(dtype),
            num_inference_steps=options.steps,
            guidance_scale=options.scale,
            output_type="pt",
        )
        return to_uint8(output.images.float() * 2 - 1)

    return draw_pictures

"""The first stage of the miniature: a VAE for pictures of flat colours."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from common.data import Batch, shuffled_indices, to_unit_range
from common.images import grid, to_uint8
from common.training import Trainer
from common.training_options import TrainingOptions
from latent_diffusion.miniature.colours import ciede2000, rgb_to_lab
from latent_diffusion.miniature.models import SIZE, make_vae
from latent_diffusion.miniature.pictures import Pictures
from latent_diffusion.saving import save_part

SHOWN = 8  # images a sample grid
SHRUNK = ((0.5, 2), (1.0, 1))  # up to which share of its steps the VAE sees pictures shrunk how many times
FLAT = 0.01  # a colour of so much of a picture's area is one of its flat areas, no shade of an edge


class RoundTrip(nn.Module):
    """The VAE from image to image.

    Args:
        vae: the VAE to train.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x0: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, take a sample of the posterior (its mean without `eps`), decode.

        Args:
            x0: images (N, 3, H, W) in [-1, 1].
            eps: standard normal noise, shaped as the latents.

        Returns:
            The images again, and mean and log variance of the posterior.
        """
        posterior = self.vae.encode(x0).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean if eps is None else mean + (logvar / 2).exp() * eps
        return self.vae.decode(latents).sample, mean, logvar


def reconstruction_loss(restored: Tensor, x0: Tensor) -> Tensor:
    """Mean absolute error of the pixels and of their differences to the next pixel, which keep edges sharp."""
    error = restored.float() - x0
    return error.abs().mean() + sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))


def flat_colours(image: np.ndarray) -> np.ndarray:
    """The colours of an image's flat areas, that of its upper left corner first: uint8 (colours, 3)."""
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    colours = colours[counts >= FLAT * counts.sum()]
    return colours[np.argsort((colours != image[0, 0]).any(axis=1), kind="stable")]


def round_trip_quality(images: Tensor, restored: Tensor) -> tuple[float, float]:
    """How well pictures of flat colours come back: mean CIEDE2000 of their flat areas, mean IoU of their discs.

    A pixel belongs to the disc whose colour is nearest; what is nearest to the corner's colour is background.

    Args:
        images: uint8 (N, 3, H, W).
        restored: the same.
    """
    differences, overlaps = [], []
    for image, other in zip(*(t.permute(0, 2, 3, 1).numpy() for t in (images, restored))):
        colours = flat_colours(image)
        distances = [((picture[..., None, :] - colours.astype(float)) ** 2).sum(-1) for picture in (image, other)]
        flat = distances[0].min(-1) == 0
        differences.append(ciede2000(rgb_to_lab(image[flat]), rgb_to_lab(other[flat])).mean())
        wanted, found = (d.argmin(-1) for d in distances)
        overlaps += [
            ((wanted == k) & (found == k)).sum() / ((wanted == k) | (found == k)).sum() for k in range(1, len(colours))
        ]
    return float(np.mean(differences)), float(np.mean(overlaps))


def train_vae(args: argparse.Namespace, options: TrainingOptions, train: Pictures, held_out: Pictures) -> Path:
    """Train the VAE and write OUT/pipeline/vae; returns that folder.

    The loss is `reconstruction_loss` plus a little of the latents' Kullback-Leibler divergence from a standard normal
    (Rombach et al. 2022, section 3.1; without its perceptual and adversarial terms, which flat colours don't need).
    Half of the steps see pictures of half the size: edges and colours are the same there for a fourth of the work.
    (Crops are not: norms over a whole picture see other statistics.)
    """
    torch.manual_seed(options.seed)
    model = RoundTrip(make_vae())
    images, kept = train.images, held_out.images[:128]
    channels, factor = model.vae.config.latent_channels, 2 ** (len(model.vae.config.block_out_channels) - 1)

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(images), options.seed, step * options.batch_size, options.batch_size)
        times = next(times for share, times in SHRUNK if step < share * options.steps)
        x0 = F.avg_pool2d(to_unit_range(images[index]), times)
        return {"x0": x0, "eps": torch.randn(len(x0), channels, *[SIZE // times // factor] * 2, generator=generator)}

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        restored, mean, logvar = model(**batch)
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return reconstruction_loss(restored, batch["x0"]) + args.kl_weight * divergence

    def round_trip(averaged: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        device = next(averaged.parameters()).device
        outputs = [averaged(to_unit_range(part).to(device))[:2] for part in pixels.split(32)]
        restored, latents = (torch.cat(parts) for parts in zip(*outputs))
        return restored.float(), latents.float()

    def validate(averaged: nn.Module) -> Tensor:
        restored, _ = round_trip(averaged, kept[:32])
        return reconstruction_loss(restored, to_unit_range(kept[:32]).to(restored.device))

    def sample(averaged: nn.Module) -> Tensor:
        restored, _ = round_trip(averaged, kept[:SHOWN])
        return grid(torch.cat([kept[:SHOWN], to_uint8(restored)]), columns=SHOWN)

    about = {"kind": "AutoencoderKL", "config": json.loads(model.vae.to_json_string())}
    notes = {"kl_weight": args.kl_weight}
    trainer = Trainer(
        model=model,
        options=options,
        folder=args.out / "stages" / "vae",
        about=about,
        make_batch=make_batch,
        loss_fn=loss_fn,
        validate=validate,
        sample=sample,
        notes=notes,
    )
    averaged = trainer.run()
    folder = args.out / "pipeline" / "vae"
    if trainer.accelerator.is_main_process:
        with torch.inference_mode(), trainer.accelerator.autocast():
            restored, _ = round_trip(averaged, kept)
            _, latents = round_trip(averaged, images[:128])
        difference, overlap = round_trip_quality(kept, to_uint8(restored))
        scaling_factor = 1 / float(latents.std())
        averaged.vae.register_to_config(scaling_factor=scaling_factor)
        save_part(folder, averaged.vae)
        print(
            f"{folder}: after a round trip of {len(kept)} held-out images flat areas are off by CIEDE2000"
            f" {difference:.2f}, discs overlap by IoU {overlap:.3f}; latents' scaling factor {scaling_factor:.4f}"
        )
    trainer.accelerator.end_training()
    return folder

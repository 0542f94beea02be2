"""Train the miniature Stable Diffusion, one part after the other.

python p3_controlnet/fill50k.py runs/fill50k
python latent_diffusion/miniature/train.py vae  --data runs/fill50k --out runs/p3_base
python latent_diffusion/miniature/train.py clip --data runs/fill50k --out runs/p3_base
python latent_diffusion/miniature/train.py unet --data runs/fill50k --out runs/p3_base

Each writes its part of OUT/pipeline, a folder that diffusers' StableDiffusionPipeline runs; the unet needs the other
two. Running a command again resumes where it stopped.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # isort: split

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPModel

from common.cli import Parser, add_options, check, option, options_from, progress, run
from common.data import Batch, shuffled_indices, stratified_timesteps, to_unit_range
from common.images import grid, to_uint8
from common.runtime import pick_device, seeded_generator
from common.schedule import NoiseSchedule
from common.training import Trainer, diffusion_loss, loss_of
from common.training_options import TrainingOptions, add_training_arguments, training_options
from latent_diffusion.base import Base, load_part, prompt_tokens
from latent_diffusion.clip import Clip
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.miniature import models
from latent_diffusion.miniature.colours import ciede2000, rgb_to_lab
from latent_diffusion.pairs import HELD_OUT_EVERY, read_hints, read_table
from latent_diffusion.saving import save_base, save_part

ROOT = Path(__file__).resolve().parents[2]
SHARPEST = 100.0  # CLIP's largest factor of the cosines, as in the paper
HELD = 256  # pictures, at most, that a stage is validated on
SHOWN = 16  # pictures in a sample grid
AT_ONCE = 32  # pictures that the VAE encodes


@dataclass(frozen=True)
class StageOptions:
    """Where a stage reads and writes, and what it minimises; a bad value is a `UserError`."""

    data: Path = option(ROOT / "runs" / "fill50k", "folder with prompt.json and target/")
    out: Path = option(ROOT / "runs" / "p3_base", "folder of the run")
    kl_weight: float = option(1e-4, "weight of the latents' Kullback-Leibler divergence from a normal distribution")
    # No min-SNR weighting, because flat colours are decided where there is hardly any signal yet: it would all but
    # leave those timesteps out.
    min_snr_gamma: float = option(0.0, "cap of the min-SNR loss weights; 0 weighs all timesteps alike")
    prompt_drop: float = option(0.1, "share of the prompts that training replaces by the empty one")
    init: Path | None = option(None, "the base, or CLIP's folder, to start from (default: at random)", type=Path)

    def __post_init__(self):
        for name in ("kl_weight", "min_snr_gamma"):
            check(name, value := getattr(self, name), 0 <= value < math.inf, "at least 0")
        check("prompt_drop", self.prompt_drop, 0 <= self.prompt_drop <= 1, "between 0 and 1")


class Pictures(NamedTuple):
    """Prompts and their pictures, uint8 (N, 3, 128, 128)."""

    prompts: list[str]
    images: Tensor


def read_pictures(folder: Path) -> tuple[Pictures, Pictures]:
    """The pictures that a folder's prompt.json lists: those to train on and, every eleventh, those held out.

    A `UserError` if the table or a picture is missing or broken, or there are too few.
    """
    pairs = read_table(folder)
    images = read_hints(pairs, folder, models.SIZE, field="target")
    held = torch.arange(len(pairs)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    both = ((~held).nonzero()[:, 0], held.nonzero()[:HELD, 0])
    train, held_out = (Pictures([pairs[k].prompt for k in index.tolist()], images[index]) for index in both)
    return train, held_out


def make_trainer(config: StageOptions, options: TrainingOptions, stage: str, model: nn.Module, **parts) -> Trainer:
    """A stage's trainer; `parts` are further arguments of `Trainer`."""
    notes = {name: getattr(config, name) for name in ("kl_weight", "min_snr_gamma", "prompt_drop")}
    folder, about = config.out / "stages" / stage, {"kind": type(model).__name__}
    return Trainer(model=model, options=options, folder=folder, about=about, notes=notes, **parts)


class RoundTrip(nn.Module):
    """A VAE from image to image."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x0: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The images again, from a sample of the posterior (its mean without `eps`); its mean and log variance."""
        posterior = self.vae.encode(x0).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean if eps is None else mean + (logvar / 2).exp() * eps
        return self.vae.decode(latents).sample, mean, logvar


def reconstruction_loss(restored: Tensor, x0: Tensor) -> Tensor:
    """Mean absolute error of the pixels and of their differences to the next pixel, which keep edges sharp."""
    error = restored.float() - x0
    return error.abs().mean() + sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))


def train_vae(config: StageOptions, options: TrainingOptions) -> Path:
    """Train the VAE and write OUT/pipeline/vae; returns that folder.

    The loss is `reconstruction_loss` plus a little of the latents' Kullback-Leibler divergence from a standard normal
    (Rombach et al. 2022, section 3.1; without its perceptual and adversarial terms, which flat colours don't need).
    The first half of the steps sees pictures of half the size, for a fourth of the work. (Crops would not do: a norm
    over a whole picture sees other statistics.)
    """
    (_, images), (_, kept) = read_pictures(config.data)
    options.seed_weights()
    model = RoundTrip(models.make_vae())

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(images), options.seed, step * options.batch_size, options.batch_size)
        times = 2 if step < options.steps / 2 else 1
        x0 = F.avg_pool2d(to_unit_range(images[index]), times)
        return {"x0": x0, "eps": torch.randn(len(x0), 4, *[models.LATENT // times] * 2, generator=generator)}

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        restored, mean, logvar = model(**batch)
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return reconstruction_loss(restored, batch["x0"]) + config.kl_weight * divergence

    def restore(averaged: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [averaged(to_unit_range(part).to(averaged.vae.device)) for part in pixels.split(AT_ONCE)]
        restored, latents, _ = (torch.cat(tensors).float() for tensors in zip(*parts))
        return restored, latents

    def validate(averaged: nn.Module) -> Tensor:
        restored, _ = restore(averaged, kept[:AT_ONCE])
        return reconstruction_loss(restored, to_unit_range(kept[:AT_ONCE]).to(restored.device))

    def measure(averaged: nn.Module) -> dict[str, float]:
        restored = to_uint8(restore(averaged, kept)[0])
        wanted, shown = (rgb_to_lab(pixels.permute(0, 2, 3, 1).numpy()) for pixels in (kept, restored))
        return {"ciede2000": float(ciede2000(wanted, shown).mean())}

    def sample(averaged: nn.Module) -> Tensor:
        shown = kept[: SHOWN // 2]
        return grid(torch.cat([shown, to_uint8(restore(averaged, shown)[0])]), columns=8)

    def write(averaged: nn.Module, facts: Mapping[str, Any]) -> None:
        with trainer.averaged_at_hand():
            _, latents = restore(averaged, images[:HELD])
        averaged.vae.register_to_config(scaling_factor=1 / float(latents.std()))
        save_part(folder, averaged.vae)

    folder = config.out / "pipeline" / "vae"
    parts = {"make_batch": make_batch, "loss_fn": loss_fn, "validate": validate, "measure": measure, "sample": sample}
    trainer = make_trainer(config, options, "vae", model, **parts)
    trainer.finish(write)
    return folder


def similarities(clip: CLIPModel, batch: Batch) -> Tensor:
    """Cosines between all texts (rows) and all pictures (columns) of a batch, float32 (N, N)."""
    output = clip(**batch)
    texts, pictures = (F.normalize(rows.float(), dim=-1) for rows in (output.text_embeds, output.image_embeds))
    with torch.autocast(texts.device.type, enabled=False):  # times a hundred, bf16 cosines would be off by a half
        return texts @ pictures.T


def contrastive_loss(clip: CLIPModel, batch: Batch) -> Tensor:
    """Each text is to find its picture among the batch's, and each picture its text (Radford et al. 2021, figure 3).

    Pictures of the very same text are not held against each other.
    """
    logits = similarities(clip, batch) * clip.logit_scale.exp().clamp(max=SHARPEST)
    same = (batch["input_ids"][:, None] == batch["input_ids"]).all(dim=-1)
    logits = logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool, device=same.device), -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_clip(config: StageOptions, options: TrainingOptions) -> Path:
    """Train CLIP and its tokenizer; write OUT/clip, and OUT/pipeline's text_encoder and tokenizer; returns OUT/clip."""
    train, held_out = read_pictures(config.data)
    options.seed_weights()
    if config.init:
        known = Clip(config.init)
        clip, tokenizer = known.model.train(), known.tokenizer
    else:
        tokenizer = models.make_tokenizer(train.prompts)
        clip = models.make_clip(tokenizer)

    def tokens(prompts: list[str]) -> Tensor:
        # Padding comes after the prompt's end, which nothing after it can change: the shortest will do.
        longest = tokenizer.model_max_length
        return tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt").input_ids

    input_ids = tokens(train.prompts)
    judged = {"pixel_values": to_unit_range(held_out.images), "input_ids": tokens(held_out.prompts)}

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(input_ids), options.seed, step * options.batch_size, options.batch_size)
        return {"pixel_values": to_unit_range(train.images[index]), "input_ids": input_ids[index]}

    def measure(averaged: nn.Module) -> dict[str, float]:
        found = loss_of(judged, similarities)(averaged).argmax(dim=1)
        return {"own_picture_first": float((found == torch.arange(len(found), device=found.device)).float().mean())}

    def write(averaged: nn.Module, facts: Mapping[str, Any]) -> None:
        save_part(config.out / "clip", averaged, tokenizer, models.make_image_processor())
        save_part(config.out / "pipeline" / "tokenizer", tokenizer)
        save_part(config.out / "pipeline" / "text_encoder", averaged.text_model)

    parts = {"make_batch": make_batch, "loss_fn": contrastive_loss, "validate": loss_of(judged, contrastive_loss)}
    make_trainer(config, options, "clip", clip, measure=measure, **parts).finish(write)
    return config.out / "clip"


def train_unet(config: StageOptions, options: TrainingOptions) -> Path:
    """Train the U-Net, and complete OUT/pipeline, which has the other parts; returns that folder."""
    folder, device = config.out / "pipeline", pick_device(options.device)
    parts = {name: load_part(folder, name, device) for name in ("vae", "text_encoder", "tokenizer")}
    options.seed_weights()
    unet = load_part(config.init, "unet").train().requires_grad_() if config.init else models.make_unet()
    base = Base(**parts, unet=unet, schedule=NoiseSchedule("cosine"), prediction="v")
    null = prompt_tokens(base.tokenizer, [""])

    def encode(pictures: Pictures) -> tuple[Tensor, Tensor]:
        images = progress(pictures.images.split(AT_ONCE), "latents", "part")
        latents = torch.cat([base.encode_images(to_unit_range(part)).cpu() for part in images])
        return latents, prompt_tokens(base.tokenizer, pictures.prompts)

    train, held_out = read_pictures(config.data)
    learned, kept = encode(train), encode(held_out)

    def draw_batch(pictures: tuple[Tensor, Tensor], index: Tensor, generator: torch.Generator, drop: float) -> Batch:
        x0, tokens = (rows[index] for rows in pictures)
        dropped = torch.rand(len(index), generator=generator) < drop
        t = stratified_timesteps(len(index), base.schedule.T, generator)
        eps = torch.randn(x0.shape, generator=generator)
        return {"x0": x0, "tokens": torch.where(dropped[:, None], null, tokens), "t": t, "eps": eps}

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(train.images), options.seed, step * options.batch_size, options.batch_size)
        return draw_batch(learned, index, generator, config.prompt_drop)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        def network(xt: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                context = base.text_encoder(tokens).last_hidden_state
            return model(xt, t, encoder_hidden_states=context).sample

        return diffusion_loss(network, batch, base.schedule, base.prediction, config.min_snr_gamma)

    def sample(averaged: nn.Module) -> Tensor:
        items = [(prompt, (k,)) for k, prompt in enumerate(held_out.prompts[:SHOWN])]  # always the same noise
        return grid(draw_prompts(replace(base, unet=averaged), items, PromptOptions(guidance_scale=2.0)), columns=8)

    watched = draw_batch(kept, torch.arange(len(held_out.images)), seeded_generator(0, 3), drop=0.0)
    parts = {"make_batch": make_batch, "loss_fn": loss_fn, "validate": loss_of(watched, loss_fn), "sample": sample}
    trainer = make_trainer(config, options, "unet", base.unet, **parts)
    trainer.finish(lambda averaged, facts: save_base(folder, replace(base, unet=averaged)))
    return folder


# Of each stage: what trains it, the flags that it has not, and its defaults.
STAGES = {
    "vae": (
        train_vae,
        ("min_snr_gamma", "prompt_drop", "init"),
        {"steps": 6500, "batch_size": 16, "lr": 6e-4, "ema": 0.99},
    ),
    "clip": (
        train_clip,
        ("kl_weight", "min_snr_gamma", "prompt_drop"),
        {"steps": 400, "batch_size": 256, "lr": 1e-3},
    ),
    "unet": (train_unet, ("kl_weight",), {"steps": 3000, "batch_size": 64, "lr": 1e-3}),
}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{vae,clip,unet}", help="the part")
    for name, (train, others, defaults) in STAGES.items():
        about = train.__doc__.splitlines()[0]
        stage = stages.add_parser(name, prog=f"train.py {name}", description=about, help=about)
        add_options(stage.add_argument_group("stage"), StageOptions, others)
        add_training_arguments(stage, **defaults)
    return parser.parse_args(argv)


def main(args) -> Path:
    """Train one part; returns the folder that it was written to."""
    return STAGES[args.stage][0](options_from(args, StageOptions), training_options(args))


if __name__ == "__main__":
    run(main, parse_arguments())

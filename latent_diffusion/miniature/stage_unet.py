"""The third stage of the miniature: a U-Net that draws what a prompt says at a place of its own choosing."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import progress
from common.data import Batch, shuffled_indices, stratified_timesteps, to_unit_range
from common.images import grid
from common.runtime import pick_device, seeded_generator
from common.schedule import NoiseSchedule
from common.training import Trainer, diffusion_loss, loss_of
from common.training_options import TrainingOptions
from latent_diffusion.base import Base, load_part, prompt_tokens
from latent_diffusion.drawing import PromptOptions, called_with_context, draw_prompts
from latent_diffusion.miniature.colours import ciede2000, colour_named, rgb_to_lab
from latent_diffusion.miniature.models import make_unet
from latent_diffusion.miniature.pictures import Pictures
from latent_diffusion.miniature.scenes import read_prompt
from latent_diffusion.saving import save_base

SHOWN, JUDGED = 16, 64  # pictures a sample grid, and to measure the finished U-Net by
STEPS, GUIDANCE = 20, 2.0
PICTURES_AT_ONCE = 32  # that the VAE encodes
RIGHT = 10.0  # CIEDE2000 up to which a colour is the named one
SEEN = 0.01  # of the area a colour must have


def shows_named_colours(image: Tensor, prompt: str) -> bool:
    """Whether every colour that a prompt names covers a part of the picture.

    Args:
        image: uint8 (3, H, W).
        prompt: a sentence of fill50k; any other gives False.
    """
    if not (named := read_prompt(prompt)):
        return False
    pixels = rgb_to_lab(image.permute(1, 2, 0).numpy())
    wanted = [rgb_to_lab(colour_named(name)) for name in (*named[0], named[1])]
    return all((ciede2000(pixels, colour) <= RIGHT).mean() >= SEEN for colour in wanted)


def train_unet(args: argparse.Namespace, options: TrainingOptions, train: Pictures, held_out: Pictures) -> Path:
    """Train the U-Net on the latents of the VAE; complete OUT/pipeline, and return it.

    Raises:
        UserError: OUT/pipeline lacks the other parts.
    """
    folder = args.out / "pipeline"
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    unet = make_unet()
    parts = {name: load_part(folder, name, device) for name in ("vae", "text_encoder", "tokenizer")}
    base = Base(**parts, unet=unet, schedule=NoiseSchedule("cosine"), prediction="v")
    run = args.out / "stages" / "unet"
    null = prompt_tokens(base.tokenizer, [""])

    def encode(pictures: Pictures) -> tuple[Tensor, Tensor]:
        parts = progress(pictures.images.split(PICTURES_AT_ONCE), "latents", "part")
        latents = torch.cat([base.encode_images(to_unit_range(part)).cpu() for part in parts])
        return latents, prompt_tokens(base.tokenizer, [pair.prompt for pair in pictures.pairs])

    encoded, kept = encode(train), encode(held_out.take(torch.arange(min(256, len(held_out)))))

    def batch_of(index: Tensor, of: tuple[Tensor, Tensor], generator: torch.Generator, drop: float) -> Batch:
        x0, tokens = (rows[index] for rows in of)
        dropped = torch.rand(len(index), generator=generator) < drop
        t = stratified_timesteps(len(index), base.schedule.T, generator)
        eps = torch.randn(x0.shape, generator=generator)
        return {"x0": x0, "tokens": torch.where(dropped[:, None], null, tokens), "t": t, "eps": eps}

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(train), options.seed, step * options.batch_size, options.batch_size)
        return batch_of(index, encoded, generator, args.prompt_drop)

    validation_batch = batch_of(torch.arange(len(kept[0])), kept, seeded_generator(0, 3), drop=0.0)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        def network(xt: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                context = base.text_encoder(tokens).last_hidden_state
            return called_with_context(model)(xt, t, context)

        return diffusion_loss(network, batch, base.schedule, base.prediction, args.min_snr_gamma)

    prompts = [pair.prompt for pair in held_out.pairs]

    def draw(averaged: nn.Module, count: int, steps: int) -> Tensor:
        items = [(prompt, (k,)) for k, prompt in enumerate(prompts[:count])]  # always the same noise
        return draw_prompts(replace(base, unet=averaged), items, PromptOptions(steps, guidance_scale=GUIDANCE))

    def sample(averaged: nn.Module) -> Tensor:
        return grid(draw(averaged, SHOWN, steps=10), columns=SHOWN // 2)

    about = {"kind": "UNet2DConditionModel", "config": json.loads(unet.to_json_string())}
    notes = {"prompt_drop": args.prompt_drop, "min_snr_gamma": args.min_snr_gamma}
    validate = loss_of(validation_batch, loss_fn)
    trainer = Trainer(
        model=unet,
        options=options,
        folder=run,
        about=about,
        make_batch=make_batch,
        loss_fn=loss_fn,
        validate=validate,
        sample=sample,
        notes=notes,
    )
    averaged = trainer.run()
    if trainer.accelerator.is_main_process:
        with torch.no_grad(), trainer.accelerator.autocast():
            images = draw(averaged, JUDGED, STEPS)
        right = np.mean([shows_named_colours(image, prompt) for image, prompt in zip(images, prompts)])
        save_base(folder, Base(**parts, unet=averaged, schedule=base.schedule, prediction=base.prediction))
        print(f"{folder}: {right:.1%} of {len(images)} pictures show all colours that their held-out prompts name")
    trainer.accelerator.end_training()
    return folder

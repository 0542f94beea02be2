"""The second stage of the miniature: a CLIP that knows circles and colours, and its tokenizer."""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from common.data import Batch, shuffled_indices, to_unit_range
from common.training import Trainer
from common.training_options import TrainingOptions
from latent_diffusion.miniature.models import make_clip, make_image_processor, make_tokenizer
from latent_diffusion.miniature.pictures import Pictures
from latent_diffusion.saving import save_part

SHARPEST = 100.0  # largest factor of the cosines, as in the paper
JUDGED = 256  # held-out pictures


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


def train_clip(args: argparse.Namespace, options: TrainingOptions, train: Pictures, held_out: Pictures) -> Path:
    """Train CLIP and its tokenizer; write OUT/clip, and OUT/pipeline's text_encoder and tokenizer; returns OUT/clip."""
    prompts = [pair.prompt for pair in train.pairs]
    tokenizer = make_tokenizer(prompts)
    torch.manual_seed(options.seed)
    clip = make_clip(tokenizer)

    def tokens(pictures: Pictures) -> Tensor:
        # Padding comes after the prompt's end, which nothing after it can change: the shortest will do.
        texts = [pair.prompt for pair in pictures.pairs]
        longest = tokenizer.model_max_length
        return tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").input_ids

    input_ids = tokens(train)
    kept = held_out.take(torch.arange(min(JUDGED, len(held_out))))
    judged = {"pixel_values": to_unit_range(kept.images), "input_ids": tokens(kept)}

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(train), options.seed, step * options.batch_size, options.batch_size)
        return {"pixel_values": to_unit_range(train.images[index]), "input_ids": input_ids[index]}

    def judge(averaged: nn.Module) -> Batch:
        return {name: tensor.to(averaged.device) for name, tensor in judged.items()}

    def validate(averaged: nn.Module) -> Tensor:
        return contrastive_loss(averaged, judge(averaged))

    about = {"kind": "CLIPModel", "config": json.loads(clip.config.to_json_string())}
    trainer = Trainer(
        model=clip,
        options=options,
        folder=args.out / "stages" / "clip",
        about=about,
        make_batch=make_batch,
        loss_fn=contrastive_loss,
        validate=validate,
    )
    averaged = trainer.run()
    folder = args.out / "clip"
    if trainer.accelerator.is_main_process:
        with torch.no_grad():
            found = similarities(averaged, judge(averaged)).argmax(dim=1).cpu()
        hits = (found == torch.arange(len(found))).float().mean()
        save_part(folder, averaged, tokenizer, make_image_processor())
        save_part(args.out / "pipeline" / "tokenizer", tokenizer)
        save_part(args.out / "pipeline" / "text_encoder", averaged.text_model)
        print(f"{folder}: of {len(found)} held-out prompts {hits:.1%} find their own picture first")
    trainer.accelerator.end_training()
    return folder

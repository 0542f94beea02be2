"""A latent diffusion, or a part of it, as the folder that diffusers and transformers read: all of it, or nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from common.output import stage_folder
from latent_diffusion.base import PREDICTIONS, SCHEDULES, Base


def save_half(part: Any, folder: Path) -> None:
    """Let a part write itself to a folder: a model in fp16, which is computed in fp32 unless told otherwise."""
    half = copy.deepcopy(part).to("cpu", torch.float16) if isinstance(part, nn.Module) else part
    half.save_pretrained(folder)
    if isinstance(part, PreTrainedModel):  # diffusers' own models are computed in fp32 anyway
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_part(folder: Path, *parts: Any) -> None:
    """Write a model of diffusers or transformers in fp16 to a folder of its own, perhaps with a tokenizer and such.

    A `UserError` if the folder cannot be written; what was there stays.
    """
    with stage_folder(folder) as stage:
        for part in parts:
            save_half(part, stage)


def save_base(folder: Path, base: Base) -> None:
    """Write a base in fp16 as a folder that `StableDiffusionPipeline.from_pretrained` runs; errors as `save_part`."""
    scheduler = DDIMScheduler(
        num_train_timesteps=base.schedule.T,
        beta_start=base.schedule.beta_start,
        beta_end=base.schedule.beta_end,
        beta_schedule=next(theirs for theirs, ours in SCHEDULES.items() if ours == base.schedule.name),
        prediction_type=next(theirs for theirs, ours in PREDICTIONS.items() if ours == base.prediction),
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    parts = {name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with stage_folder(folder) as stage:
        StableDiffusionPipeline(**parts, scheduler=scheduler, **absent).save_config(stage)
        scheduler.save_pretrained(stage / "scheduler")
        for name, part in parts.items():
            save_half(part, stage / name)

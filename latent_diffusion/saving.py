"""A latent diffusion, or a part of it, as the folder that diffusers and transformers read: all of it, or nothing."""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import SafetensorError
from transformers import PreTrainedModel

from common.checkpoint import UNFINISHED
from common.cli import UserError
from latent_diffusion.base import PREDICTIONS, SCHEDULES, Base, quiet


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: `folder` is a file, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder to write to")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=UNFINISHED))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        new, old = stage / "new", stage / "old"
        new.mkdir()
        yield new
        umask = os.umask(0)
        os.umask(umask)
        for file in new.rglob("*.safetensors"):
            file.chmod(0o666 & ~umask)  # safetensors makes its files private
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); free space or choose another folder") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def in_half(model: Any) -> Any:
    """A copy of a model in fp16, as weights are shipped."""
    return copy.deepcopy(model).to("cpu", torch.float16)


def compute_in_fp32(folder: Path) -> None:
    """Let transformers compute a saved model in fp32 unless told otherwise, as diffusers does with its own models."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"dtype": "float32"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def save_part(folder: Path, part: Any, *companions: Any) -> None:
    """Write one model of diffusers or transformers in fp16 to a folder of its own: all of it, or nothing.

    Args:
        folder: to write to; what it held is replaced.
        part: a model, or anything else with `save_pretrained`.
        companions: what belongs into the same folder, such as a tokenizer.

    Raises:
        UserError: the folder cannot be written; what was there stays.
    """
    with replaced_folder(folder) as new, quiet():
        for item in (part, *companions):
            (in_half(item) if isinstance(item, torch.nn.Module) else item).save_pretrained(new)
        if isinstance(part, PreTrainedModel):
            compute_in_fp32(new)


def save_base(folder: Path, base: Base) -> None:
    """Write a base in fp16 as a folder that `StableDiffusionPipeline.from_pretrained` runs: all of it, or nothing.

    Raises:
        UserError: the folder cannot be written; what was there stays.
    """
    theirs = {ours: name for name, ours in SCHEDULES.items()}
    scheduler = DDIMScheduler(
        num_train_timesteps=base.schedule.T,
        beta_start=base.schedule.beta_start,
        beta_end=base.schedule.beta_end,
        beta_schedule=theirs[base.schedule.name],
        prediction_type={ours: name for name, ours in PREDICTIONS.items()}[base.prediction],
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    with replaced_folder(folder) as new, quiet():
        StableDiffusionPipeline(
            **{name: in_half(getattr(base, name)) for name in ("vae", "text_encoder", "unet")},
            tokenizer=base.tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(new)
        compute_in_fp32(new / "text_encoder")

"""The frozen latent diffusion that both editions of problem 3 steer, from a diffusers folder or one file."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from common.cli import UserError
from common.files import read_json
from common.schedule import NoiseSchedule
from latent_diffusion.files import SD_V1, find_folder, find_variant, read_stable_diffusion

# The libraries' progress bars and advice would drown the programs' own words.
for library in (diffusers.utils.logging, transformers.utils.logging):
    library.set_verbosity_error()
    library.disable_progress_bar()

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
PARTS = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer, "unet": UNet2DConditionModel}
PROMPTS_AT_ONCE = 64
PIXELS_AT_ONCE = 2**18  # that the VAE decodes: one picture of 512x512, or 16 of 128x128


def vector_tokens(token: str, vectors: int) -> list[str]:
    """The tokens that a word of so many vectors stands for, as diffusers names them: <new>, <new>_1, <new>_2, ..."""
    return [token, *(f"{token}_{k}" for k in range(1, vectors))]


def expand_words(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The prompt with every learned word of several vectors replaced by the tokens of all its vectors."""
    added = tokenizer.added_tokens_encoder
    for token in added:
        vectors = 1
        while f"{token}_{vectors}" in added:
            vectors += 1
        if vectors > 1:
            # Not within the name of another vector; in any case, as the tokenizer ignores it too.
            pattern, whole = rf"{re.escape(token)}(?!_\d)", " ".join(vector_tokens(token, vectors))
            prompt = re.sub(pattern, lambda _, whole=whole: whole, prompt, flags=re.IGNORECASE)
    return prompt


def prompt_tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str], where: Sequence[str] | None = None) -> Tensor:
    """Prompts as a text encoder takes them: int64 (N, longest), between marks of start and end, padded.

    Prompts with more tokens than the encoder takes (77, two of which are the marks) are cut, each with a warning that
    starts with its entry of `where`, such as a file and line.
    """
    longest = tokenizer.model_max_length
    expanded = [expand_words(tokenizer, prompt) for prompt in prompts]
    for k, ids in enumerate(tokenizer(expanded, verbose=False).input_ids):
        if len(ids) > longest:
            cut = f"prompt of {len(ids)} tokens is cut to {longest}: {prompts[k][:40]!r}..."
            print(f"warning: {where[k]}: {cut}" if where else f"warning: {cut}", file=sys.stderr)
    options = {"padding": "max_length", "max_length": longest, "truncation": True}
    return tokenizer(expanded, **options, return_tensors="pt").input_ids


def to_fp32(*models: nn.Module) -> bool:
    """Turn models to fp32 in place; returns False if all are in fp32 already."""
    if all(model.dtype == torch.float32 for model in models):
        return False
    for model in models:
        model.float()
    return True


@dataclass(frozen=True)
class Base:
    """A latent diffusion whose weights stay as they are; all models on one device and of one dtype."""

    vae: AutoencoderKL  # between images and latents
    text_encoder: CLIPTextModel  # from tokens to the contexts that the U-Net attends to
    tokenizer: CLIPTokenizer  # from prompts to tokens
    unet: UNet2DConditionModel  # called with latents, timesteps and contexts
    schedule: NoiseSchedule  # that the U-Net was trained with
    prediction: str  # what the U-Net predicts: eps, x0 or v

    @property
    def factor(self) -> int:
        """Pixels a latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.vae.device

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], where: Sequence[str] | None = None) -> Tensor:
        """Contexts of prompts: the text encoder's last hidden states (N, tokens, width); see `prompt_tokens`."""
        tokens = prompt_tokens(self.tokenizer, prompts, where).to(self.device)
        return torch.cat([self.text_encoder(part).last_hidden_state for part in tokens.split(PROMPTS_AT_ONCE)])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images: the posterior's mean times the scaling factor (Rombach et al. 2022, appendix G).

        From (N, 3, H, W) in [-1, 1] to (N, C, H / factor, W / factor) of the models' dtype, about standard normal.
        """
        mean = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.mean
        return mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents: float32 (N, 3, H, W) in [-1, 1].

        Decoded in slices, since decoding takes more memory than a step of the U-Net. A VAE that overflows in half
        precision, which would give black pictures, is turned to fp32 and stays so.
        """
        latents = (latents / self.vae.config.scaling_factor).to(self.device)
        at_once = max(1, PIXELS_AT_ONCE // (latents[0, 0].numel() * self.factor**2))
        images = []
        for part in latents.split(at_once):
            images.append(self.vae.decode(part.to(self.vae.dtype)).sample.float())
            if not images[-1].isfinite().all() and to_fp32(self.vae):
                print("warning: the VAE overflows in half precision; decoding in fp32 from here on", file=sys.stderr)
                images[-1] = self.vae.decode(part.float()).sample
        return torch.cat(images).clamp(-1, 1)


def read_schedule(file: Path) -> tuple[NoiseSchedule, str]:
    """The schedule and the kind of prediction in a scheduler's config; a `UserError` for those not known here."""
    config = read_json(file, "restore it")
    try:
        chosen = {"beta_schedule": config["beta_schedule"], "prediction_type": config.get("prediction_type", "epsilon")}
        numbers = [config[name] for name in ("num_train_timesteps", "beta_start", "beta_end")]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a scheduler's config ({type(error).__name__}: {error}); restore it") from None
    for name, known in (("beta_schedule", SCHEDULES), ("prediction_type", PREDICTIONS)):
        if chosen[name] not in known:
            raise UserError(f"{file}: its {name} is {chosen[name]}; a base needs one of {', '.join(known)}")
    for name in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(name):
            raise UserError(f"{file}: has {name}, which is not supported; name a base without")
    return NoiseSchedule(SCHEDULES[chosen["beta_schedule"]], *numbers), PREDICTIONS[chosen["prediction_type"]]


def load_part(folder: Path, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """One part of a pipeline folder, a key of `PARTS`, frozen and in eval mode.

    A `UserError` if the part is missing, broken, incomplete, or another kind of model.
    """
    part, kind = Path(folder) / name, PARTS[name]
    if not part.is_dir():
        raise UserError(f"{part}: no such folder; a base has {', '.join(PARTS)} and scheduler")
    # Without its files transformers makes up a tokenizer that knows no word.
    if name == "tokenizer" and not any((part / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{part}: holds neither tokenizer.json nor vocab.json; restore it, or name another base")
    try:
        if name == "tokenizer":
            return kind.from_pretrained(part, local_files_only=True)
        # In another dtype, both libraries would make it torch's default for all threads while they read.
        options = {"dtype": torch.float32, "output_loading_info": True, "variant": find_variant(part)}
        model, information = kind.from_pretrained(part, local_files_only=True, **options)
    except Exception as error:  # both libraries let through whatever they stumble over
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{part}: not a {kind.__name__} ({reason}); restore it, or name another base") from None
    if missing := sorted(information["missing_keys"]):
        raise UserError(f"{part}: lacks {len(missing)} weights ({', '.join(missing[:3])}); restore it")
    # channels_last is what tensor cores and oneDNN want for convolutions.
    return model.requires_grad_(False).eval().to(device, dtype, memory_format=torch.channels_last)


def load_base(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
) -> Base:
    """Read a Stable Diffusion v1, without network.

    Args:
        path: a folder that diffusers' `StableDiffusionPipeline.save_pretrained` wrote, whose safety checker is not
            read; or a single file in the original layout, `.ckpt` or `.safetensors`.
        device, dtype: of the weights in memory, whatever they are on disk.
        cache: see `read_stable_diffusion`; errors also as there, and as `load_part`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a Stable Diffusion v1, such as sd-v1-4.ckpt")
    folder = find_folder(path, "scheduler/scheduler_config.json") if path.is_dir() else SD_V1
    schedule, prediction = read_schedule(folder / "scheduler" / "scheduler_config.json")
    loaded = {} if path.is_dir() else read_stable_diffusion(path, device, dtype, cache)
    parts = {name: loaded.get(name) or load_part(folder, name, device, dtype) for name in PARTS}
    width, wanted = parts["text_encoder"].config.hidden_size, parts["unet"].config.cross_attention_dim
    if width != wanted:
        raise UserError(f"{path}: its text encoder gives width {width}, its unet wants {wanted}; name another base")
    return Base(**parts, schedule=schedule, prediction=prediction)

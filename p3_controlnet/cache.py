"""What never changes while a U-Net or a ControlNet trains: latents and contexts, encoded once."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import load_about, load_tensors, save_tensors
from common.data import to_unit_range
from common.pairs import Pair
from common.stable_diffusion.base import Base

IMAGES_AT_ONCE = 32
PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class Cache:
    """Encoded pairs.

    Attributes:
        latents: (N, 4, h, w), scaled; fp16.
        contexts: (U, 77, D), one row a distinct prompt; fp16.
        rows: (N,) int64, each pair's row of `contexts`.
        null_context: (77, D), the empty prompt's.
    """

    latents: Tensor
    contexts: Tensor
    rows: Tensor
    null_context: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, index: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents and contexts of some pairs, float32.

        Args:
            index: int64 (n,), which pairs.
            dropped: bool (n,), which of them get the empty prompt's context.
        """
        contexts = self.contexts[self.rows[index]]
        if dropped is not None:
            contexts[dropped] = self.null_context
        return self.latents[index].float(), contexts.float()


def fingerprint(base: Base, prompts: Sequence[str], images: Tensor) -> str:
    """A hash of everything that the encoded pairs depend on: the encoders' weights and vocabulary, and the data."""
    digest = hashlib.sha256(f"{base.vae.config.scaling_factor} {base.vae.dtype} {tuple(images.shape)}".encode())
    for model in (base.vae, base.text_encoder):
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    # Not the whole tokenizer, which remembers how it padded last.
    digest.update(json.dumps(json.loads(base.tokenizer.backend_tokenizer.to_str())["model"]).encode())
    digest.update("\0".join(prompts).encode())
    digest.update(images.contiguous().numpy())
    return digest.hexdigest()


def encode(base: Base, pairs: Sequence[Pair], images: Tensor) -> Cache:
    """Encode pairs; shows its progress where stderr is a terminal."""
    prompts = [pair.prompt for pair in pairs]
    first = {pair.prompt: pair.where for pair in reversed(pairs)}
    distinct = ["", *(prompt for prompt in dict.fromkeys(prompts) if prompt)]
    row = {prompt: k for k, prompt in enumerate(distinct)}
    contexts, latents = [], []
    with tqdm(total=len(distinct) + len(images), desc="encode", unit="", disable=None) as bar:
        for start in range(0, len(distinct), PROMPTS_AT_ONCE):
            part = distinct[start : start + PROMPTS_AT_ONCE]
            where = [first.get(prompt, "") for prompt in part]
            contexts.append(base.encode_prompts(part, where).to("cpu", torch.float16))
            bar.update(len(part))
        for part in images.split(IMAGES_AT_ONCE):
            latents.append(base.encode_images(to_unit_range(part)).to("cpu", torch.float16))
            bar.update(len(part))
    contexts = torch.cat(contexts)
    rows = torch.tensor([row[prompt] for prompt in prompts])
    return Cache(torch.cat(latents), contexts, rows, contexts[0].clone())


def encode_pairs(base: Base, pairs: Sequence[Pair], images: Tensor, path: Path | None = None) -> Cache:
    """The pairs' latents and contexts: read from `path` if it holds just these, else encoded, and written there.

    Args:
        base: its VAE and text encoder encode.
        pairs: for their prompts.
        images: their targets, uint8 (N, 3, H, W).
        path: a safetensors file; None keeps nothing.

    Raises:
        UserError: the file cannot be written, or is no safetensors file.
    """
    key = {"key": fingerprint(base, [pair.prompt for pair in pairs], images)}
    if path and path.exists() and load_about(path) == key:
        return Cache(**load_tensors(path)[0])
    cache = encode(base, pairs, images)
    if path:
        save_tensors(path, vars(cache), key)
    return cache

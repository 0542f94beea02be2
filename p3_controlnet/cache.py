"""What never changes while a U-Net or a ControlNet trains: latents and contexts, encoded once and kept in shards.

A shard is one safetensors file of up to 256 rows, written whole or not at all, with a hash of all that it was made of.
So an encoding that was killed goes on at the first shard that is missing, and when the base or the data change, the
shards that this concerns are made anew. Shards are mapped, not read: fill50k's 50,000 latents of 512x512 pictures are
1.6 GB and its prompts' contexts 2 GB, of which memory holds what a batch asks for.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import load_about, load_tensors, remove_unfinished, save_tensors
from common.cli import UserError, progress
from common.data import to_unit_range
from latent_diffusion.base import Base
from latent_diffusion.pairs import Pair, locate, read_hints

SHARD = 256  # rows
PIXELS_AT_ONCE = 2**19  # that the VAE encodes: two pictures of 512x512, or 32 of 128x128
WAIT = 0.2  # seconds between looks for another process's shard


class Shards:
    """Rows of many tensors as if they were one.

    Args:
        parts: tensors of the same shape but for the last one, which may have fewer rows.
    """

    def __init__(self, parts: Sequence[Tensor]):
        self.parts, self.rows = list(parts), len(parts[0])

    def __len__(self) -> int:
        return self.rows * (len(self.parts) - 1) + len(self.parts[-1])

    def __getitem__(self, index: Tensor) -> Tensor:
        """A copy of the rows at these positions, int64 (n,)."""
        return torch.stack([self.parts[i // self.rows][i % self.rows] for i in index.tolist()])


@dataclass(frozen=True)
class Cache:
    """Encoded pairs.

    Attributes:
        latents: (N, 4, h, w), scaled; fp16.
        contexts: (U, 77, D), one row a distinct prompt, the first the empty prompt's; fp16.
        rows: (N,) int64, each pair's row of `contexts`.
    """

    latents: Shards
    contexts: Shards
    rows: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def null_context(self) -> Tensor:
        """(77, D), the empty prompt's; float32."""
        return self.contexts[torch.tensor([0])][0].float()

    def take(self, index: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents and contexts of some pairs, float32.

        Args:
            index: int64 (n,), which pairs.
            dropped: bool (n,), which of them get the empty prompt's context.
        """
        rows = self.rows[index]
        if dropped is not None:
            rows = rows.masked_fill(dropped, 0)
        return self.latents[index].float(), self.contexts[rows].float()


def weights_hash(model: nn.Module, *facts: object) -> str:
    """A hash of a model's weights and of further facts."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def file_hashes(pairs: Sequence[Pair], folder: Path) -> list[str]:
    """A hash of each target's file.

    Raises:
        UserError: a file is missing; with the table's line.
    """

    def of(pair: Pair) -> str:
        path = locate(pair.target, folder, "target")
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{pair.where}: {path}: {error.strerror}; fix the name or add the file") from None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(of, pairs))


def sharded(
    name: str,
    sources: Sequence[str],
    base_hash: str,
    encode: Callable[[slice], Tensor],
    folder: Path | None,
    environment: Mapping[str, str] = os.environ,
) -> Shards:
    """Rows made of sources, as fp16: those shards that lie in the folder are taken, the others made and written there.

    Where several processes share a run, each makes its part of the missing shards and waits for the others'.

    Args:
        name: of the tensor, and the start of the shards' file names.
        sources: one a row: what it is made of, or a hash of that.
        base_hash: of what makes it.
        encode: from a range of rows to the rows.
        folder: of the shards; None keeps them in memory.
        environment: where `RANK` and `WORLD_SIZE` stand if there are several processes.

    Raises:
        UserError: a file cannot be written, or is no safetensors file.
    """
    starts = range(0, len(sources), SHARD)
    ranges = [slice(start, min(start + SHARD, len(sources))) for start in starts]
    if folder is None:
        return Shards([encode(rows).to("cpu", torch.float16) for rows in progress(ranges, name, "shard")])
    paths = [folder / f"{name}_{k:05d}.safetensors" for k in range(len(ranges))]
    keys = [{"key": hashlib.sha256("\0".join([base_hash, *sources[rows]]).encode()).hexdigest()} for rows in ranges]

    def missing(k: int) -> bool:
        return not paths[k].exists() or load_about(paths[k]) != keys[k]

    absent = [k for k in range(len(paths)) if missing(k)]
    rank, count = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    # By number, since the others may see fewer missing than this process does.
    for k in progress([k for k in absent if k % count == rank], name, "shard"):
        save_tensors(paths[k], {name: encode(ranges[k])}, keys[k])
    for k in absent:
        while missing(k):  # no barrier: it would give up after minutes, and encoding takes longer
            time.sleep(WAIT)
    return Shards([load_tensors(path)[0][name] for path in paths])


def encode_pairs(base: Base, pairs: Sequence[Pair], data: Path, size: int, folder: Path | None = None) -> Cache:
    """The pairs' latents and contexts: from shards in a folder as far as they are there, else encoded.

    Args:
        base: its VAE and text encoder encode.
        pairs: their targets and prompts.
        data: folder of the targets.
        size: side to which targets are resized.
        folder: for the shards; None keeps them in memory.

    Raises:
        UserError: a target is missing or broken, or a shard cannot be written.
    """
    if folder and folder.is_dir() and int(os.environ.get("RANK", "0")) == 0:
        remove_unfinished(folder)
    prompts = [pair.prompt for pair in pairs]
    first = {pair.prompt: pair.where for pair in reversed(pairs)}
    distinct = ["", *(prompt for prompt in dict.fromkeys(prompts) if prompt)]
    row = {prompt: k for k, prompt in enumerate(distinct)}
    at_once = max(1, PIXELS_AT_ONCE // size**2)

    def encode_prompts(rows: slice) -> Tensor:
        return base.encode_prompts(distinct[rows], [first.get(prompt, "") for prompt in distinct[rows]]).half()

    def encode_targets(rows: slice) -> Tensor:
        images = read_hints(pairs[rows], data, size, "target")
        return torch.cat([base.encode_images(to_unit_range(part)).half().cpu() for part in images.split(at_once)])

    # Not the whole tokenizer, which remembers how it padded last.
    words = json.loads(base.tokenizer.backend_tokenizer.to_str())["model"]
    text_hash = weights_hash(base.text_encoder, words)
    image_hash = weights_hash(base.vae, base.vae.config.scaling_factor, size)
    return Cache(
        sharded("latents", file_hashes(pairs, data), image_hash, encode_targets, folder),
        sharded("contexts", distinct, text_hash, encode_prompts, folder),
        torch.tensor([row[prompt] for prompt in prompts]),
    )

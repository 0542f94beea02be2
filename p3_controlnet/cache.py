"""From a table of pairs to the batches of training: latents and contexts, encoded once and kept in shards, and hints.

A shard is one safetensors file of up to 256 rows with a hash of all that it was made of. An encoding that was killed
therefore goes on at the first shard that is missing, and when the base or the data change, only the shards that this
concerns are made anew. Shards are memory-mapped and hints are read on demand where they are many, so RAM use stays
flat: fill50k's latents of 512x512 pictures are 1.6 GB, its prompts' contexts 2 GB and its hints 39 GB.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import hash_weights, load_about, load_tensors, save_tensors
from common.cli import UserError, progress
from common.data import Batch, shuffled_indices, stratified_timesteps, to_unit_range
from common.schedule import NoiseSchedule
from latent_diffusion.base import Base
from latent_diffusion.pairs import Pair, locate, read_hints

SHARD = 256  # rows
PIXELS_AT_ONCE = 2**19  # that the VAE encodes: two pictures of 512x512, or 32 of 128x128
WAIT = 0.2  # seconds between looks for another process's shard
IN_MEMORY = 2**31  # bytes of hints


class Shards:
    """Rows of many tensors as if they were one; the last tensor may have fewer rows than the others."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts, self.rows = list(parts), len(parts[0])

    def __getitem__(self, index: Tensor) -> Tensor:
        """A copy of the rows at these positions, int64 (n,)."""
        return torch.stack([self.parts[i // self.rows][i % self.rows] for i in index.tolist()])


@dataclass(frozen=True)
class Cache:
    """Encoded pairs."""

    latents: Shards  # (N, 4, h, w), scaled; fp16
    contexts: Shards  # (U, 77, D), one row a distinct prompt, the first the empty prompt's; fp16
    rows: Tensor  # (N,) int64, each pair's row of `contexts`

    @property
    def null_context(self) -> Tensor:
        """(77, D), the empty prompt's; float32."""
        return self.contexts[torch.tensor([0])][0].float()

    def take(self, index: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and contexts of the pairs at these positions, float32; the dropped get the empty prompt's context."""
        return self.latents[index].float(), self.contexts[self.rows[index].masked_fill(dropped, 0)].float()


def hash_target(pair: Pair, folder: Path) -> str:
    """A hash of the target's file; raises a `UserError` with the table's line if it is missing."""
    path = locate(pair.target, folder, "target")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{pair.where}: {path}: {error.strerror}; fix the name or add the file") from None


def encode_shards(
    name: str,
    sources: Sequence[str],
    base_hash: str,
    encode: Callable[[slice], Tensor],
    folder: Path | None,
    rank: int = 0,
    processes: int = 1,
) -> Shards:
    """Rows as fp16: shards that lie in the folder are taken, the others made and written there, or kept in memory.

    Processes that share a run each make their part of the missing shards and wait for the others'.

    Args:
        name: of the tensor, and the start of the shards' file names.
        sources: one a row: what it is made of, or a hash of that.
        base_hash: of the weights that make it.
        encode: from a range of rows to the rows, fp16 on the CPU.
    """
    starts = range(0, len(sources), SHARD)
    ranges = [slice(start, min(start + SHARD, len(sources))) for start in starts]
    if folder is None:
        return Shards([encode(rows) for rows in progress(ranges, name, "shard")])
    paths = [folder / f"{name}_{k:05d}.safetensors" for k in range(len(ranges))]
    keys = [{"key": hashlib.sha256("\0".join([base_hash, *sources[rows]]).encode()).hexdigest()} for rows in ranges]

    def missing(k: int) -> bool:
        return not paths[k].exists() or load_about(paths[k]) != keys[k]

    absent = [k for k in range(len(paths)) if missing(k)]
    # By number, since the others may see fewer missing than this process does.
    for k in progress([k for k in absent if k % processes == rank], name, "shard"):
        save_tensors(paths[k], {name: encode(ranges[k])}, keys[k])
    for k in absent:
        while missing(k):  # no barrier: it would give up after minutes, and encoding takes longer
            time.sleep(WAIT)
    return Shards([load_tensors(path)[0][name] for path in paths])


def encode_pairs(base: Base, pairs: Sequence[Pair], data: Path, size: int, folder: Path | None = None) -> Cache:
    """The latents of the targets in `data`, resized to squares of `size`, and the prompts' contexts.

    A `UserError` if a target is missing or broken, or a shard cannot be written.
    """
    process = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = {pair.prompt: pair.where for pair in reversed(pairs)}
    distinct = ["", *(prompt for prompt in dict.fromkeys(pair.prompt for pair in pairs) if prompt)]
    row = {prompt: k for k, prompt in enumerate(distinct)}
    at_once = max(1, PIXELS_AT_ONCE // size**2)

    def encode_prompts(rows: slice) -> Tensor:
        contexts = base.encode_prompts(distinct[rows], [first.get(prompt, "") for prompt in distinct[rows]])
        return contexts.half().cpu()

    def encode_targets(rows: slice) -> Tensor:
        images = read_hints(pairs[rows], data, size, "target")
        return torch.cat([base.encode_images(to_unit_range(part)).half().cpu() for part in images.split(at_once)])

    # Not the whole tokenizer, which remembers how it padded last.
    words = json.loads(base.tokenizer.backend_tokenizer.to_str())["model"]
    text_hash = hash_weights(base.text_encoder, words)
    image_hash = hash_weights(base.vae, base.vae.config.scaling_factor, size)
    with ThreadPoolExecutor() as pool:
        targets = list(pool.map(partial(hash_target, folder=data), pairs))
    return Cache(
        encode_shards("latents", targets, image_hash, encode_targets, folder, *process),
        encode_shards("contexts", distinct, text_hash, encode_prompts, folder, *process),
        torch.tensor([row[pair.prompt] for pair in pairs]),
    )


def hint_reader(pairs: Sequence[Pair], data: Path, size: int) -> Callable[[Tensor], Tensor]:
    """From positions of pairs, int64 (n,), to their hints, uint8 (n, 3, size, size).

    Hints that fit into `IN_MEMORY` are read now, more of them on demand.
    """

    def read(index: Tensor) -> Tensor:
        return read_hints([pairs[k] for k in index.tolist()], data, size)

    if len(pairs) * 3 * size**2 > IN_MEMORY:
        return read
    return read(torch.arange(len(pairs))).__getitem__


@dataclass(frozen=True)
class PairBatches:
    """Draws batches of latents, prompts and hints that belong together, of the pairs at the positions `members`.

    The share `drop` of the prompts is replaced by the empty one, so that the hint must say all. The order in which
    pairs come depends on the seed alone.
    """

    cache: Cache
    hints: Callable[[Tensor], Tensor]
    members: Tensor
    schedule: NoiseSchedule
    batch_size: int
    drop: float
    seed: int

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        count = self.batch_size
        index = self.members[shuffled_indices(len(self.members), self.seed, step * count, count)]
        x0, context = self.cache.take(index, torch.rand(count, generator=generator) < self.drop)
        return {
            "x0": x0,
            "context": context,
            "hint": self.hints(index),
            "t": stratified_timesteps(count, self.schedule.T, generator),
            "eps": torch.randn(x0.shape, generator=generator),
        }

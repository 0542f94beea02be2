"""What the base encodes, kept in shards until the base or the data they were made of change; and the batches."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.cli import UserError
from common.data import to_unit_range
from common.images import save_png
from common.runtime import seeded_generator
from latent_diffusion.base import Base, load_base
from latent_diffusion.pairs import Pair, read_hints, read_pairs
from p3_controlnet import cache as module
from p3_controlnet.cache import PairBatches, encode_pairs, hint_reader

PROMPTS = ["red circle", "blue circle", "red circle", "", "Red circle"]
PAIRS = [Pair(f"{k}.png", f"{k}.png", prompt, f"prompt.json line {k + 1}") for k, prompt in enumerate(PROMPTS)]
ALL, NONE = torch.arange(5), torch.zeros(5, dtype=torch.bool)


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def data(images, tmp_path) -> Path:
    """The folder of the targets."""
    for k, image in enumerate(images):
        save_png(tmp_path / "data" / f"{k}.png", image)
    return tmp_path / "data"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Shards of two rows; collects how many pictures and prompts are encoded at a time."""
    monkeypatch.setattr(module, "SHARD", 2)
    calls = []
    for name in ("encode_images", "encode_prompts"):
        whole = getattr(Base, name)

        def call(base, items, *others, whole=whole):
            calls.append(len(items))
            return whole(base, items, *others)

        monkeypatch.setattr(Base, name, call)
    return calls


@pytest.mark.parametrize(("shard", "pixels", "kept"), [(2, 64**2, True), (2, 3 * 64**2, False), (256, 64**2, True)])
def test_the_cache_holds_what_the_base_encodes(base, images, data, tmp_path, monkeypatch, shard, pixels, kept):
    monkeypatch.setattr(module, "SHARD", shard)
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", pixels)
    cache = encode_pairs(base, PAIRS, data, 64, tmp_path / "cache" if kept else None)
    assert {part.dtype for part in (*cache.latents.parts, *cache.contexts.parts)} == {torch.float16}
    assert sum(map(len, cache.contexts.parts)) == 4
    maps = Path("/proc/self/maps").read_text()
    assert (str(tmp_path / "cache" / "latents_00000.safetensors") in maps) == kept, "shards stay on disk"
    latents, contexts = base.encode_images(to_unit_range(images)), base.encode_prompts(PROMPTS)
    x0, context = cache.take(ALL, NONE)
    assert x0.dtype == context.dtype == torch.float32
    assert (x0 - latents).abs().max() <= 1e-3 * latents.abs().max()
    assert (context - contexts).abs().max() <= 1e-3 * contexts.abs().max()
    index, dropped = torch.tensor([4, 0, 1]), torch.tensor([False, True, False])
    some, context = cache.take(index, dropped)
    assert torch.equal(some, x0[index])
    assert (context - base.encode_prompts(["Red circle", "", "blue circle"])).abs().max() <= 1e-3
    assert torch.equal(cache.null_context, context[1])


def test_a_killed_encoding_goes_on_at_the_missing_shard(base, data, tmp_path, encoded, monkeypatch):
    folder = tmp_path / "cache"
    expected = encode_pairs(base, PAIRS, data, 64).take(ALL, NONE)
    save = module.save_tensors

    def killed(path, *rest):
        if path.name == "latents_00001.safetensors":
            raise KeyboardInterrupt
        save(path, *rest)

    monkeypatch.setattr(module, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        encode_pairs(base, PAIRS, data, 64, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["latents_00000.safetensors"]
    monkeypatch.setattr(module, "save_tensors", save)
    encoded.clear()
    cache = encode_pairs(base, PAIRS, data, 64, folder)
    assert encoded == [2, 1, 2, 2]  # two shards of latents, two of contexts
    assert all(torch.equal(one, other) for one, other in zip(cache.take(ALL, NONE), expected))
    assert len(list(folder.iterdir())) == 5


def test_only_what_changed_is_made_anew(pipeline_folder, images, data, tmp_path, encoded):
    folder, base = tmp_path / "cache", load_base(pipeline_folder)

    def anew(base, pairs=PAIRS, size=64) -> list[int]:
        encoded.clear()
        cache, done = encode_pairs(base, pairs, data, size, folder), list(encoded)
        fresh = encode_pairs(base, pairs, data, size).take(ALL, NONE)
        assert all(torch.equal(one, other) for one, other in zip(cache.take(ALL, NONE), fresh))
        return done

    assert anew(base) == [2, 2, 1, 2, 2]
    assert anew(load_base(pipeline_folder)) == []  # another tokenizer, which has not padded yet
    images[4, 2, 63, 63] ^= 1
    save_png(data / "4.png", images[4])
    assert anew(base) == [1]
    swapped = [PAIRS[k] for k in (0, 3, 2, 1, 4)]
    assert anew(base, swapped) == [2, 2]  # pictures 2 and 4; no new prompt, and the same order of prompts
    other = [*PAIRS[:4], Pair("4.png", "4.png", "red  circle", "prompt.json line 5")]
    assert anew(base, other) == [2, 2, 2]  # the pictures in their order again, and the last prompts
    assert anew(base, other, size=32) == [2, 2, 1]
    base.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1
    assert anew(base, other, size=32) == [2, 2, 1]
    next(base.text_encoder.parameters())[0, 0] += 1
    assert anew(base, other, size=32) == [2, 2]


def test_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 2)
    monkeypatch.setattr(module, "WAIT", 0.01)
    made, numbers = [], torch.arange(7)[:, None].half()

    def encode(rows):
        made.append(rows.start)
        return numbers[rows]

    def process(rank):
        time.sleep(0.1 * rank)  # the second finds a shard of the first
        return module.encode_shards("x", list("abcdefg"), "key", encode, tmp_path, rank, 2)

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(process, rank) for rank in range(2)]
        for shards in (future.result(timeout=30) for future in waiting):
            assert torch.equal(shards[torch.arange(7)], numbers)
    assert sorted(made) == [0, 2, 4, 6]


def test_what_is_broken_or_too_long_is_named(base, data, tmp_path, capsys):
    long = [Pair("0.png", "0.png", "x" * 90, f"prompt.json line {k + 4}") for k in range(5)]
    encode_pairs(base, long, data, 64)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: prompt.json line 4: prompt of 92 tokens is cut to 77")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "latents_00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=f"^{folder}/latents_00000.safetensors: is a text file"):
        encode_pairs(base, PAIRS, data, 64, folder)
    (data / "3.png").unlink()
    with pytest.raises(UserError, match=r"^prompt.json line 4: .*3.png: No such file"):
        encode_pairs(base, PAIRS, data, 64)


def test_hints_are_the_same_from_memory_and_from_files(circles, monkeypatch):
    pairs, index = read_pairs(circles / "prompt.json"), torch.tensor([7, 2, 7])
    kept = hint_reader(pairs, circles, 64)
    monkeypatch.setattr(module, "IN_MEMORY", len(pairs) * 3 * 64 * 64 - 1)
    on_demand = hint_reader(pairs, circles, 64)
    expected = read_hints(pairs, circles, 64)[index]
    assert torch.equal(kept(index), expected)
    assert torch.equal(on_demand(index), expected)
    monkeypatch.setattr(module, "read_hints", None)
    with pytest.raises(TypeError):
        on_demand(index)


def test_prompts_are_dropped_as_often_as_told_and_hints_keep_their_targets(circles, base):
    pairs = read_pairs(circles / "prompt.json")
    cache, hints = encode_pairs(base, pairs, circles, 64), read_hints(pairs, circles, 64)
    batches = PairBatches(cache, hints.__getitem__, torch.arange(44), base.schedule, 400, 0.25, seed=0)
    batch = batches(0, seeded_generator(0, 1, 0))
    empty = base.encode_prompts([""])[0]
    dropped = (batch["context"] - empty).flatten(1).abs().amax(1) < 1e-3
    assert dropped.sum().item() == pytest.approx(100, abs=35)
    by_hint = {hint.numpy().tobytes(): k for k, hint in enumerate(hints)}
    own = torch.tensor([by_hint[hint.numpy().tobytes()] for hint in batch["hint"]])
    latents, contexts = cache.take(own, dropped)
    assert torch.equal(batch["x0"], latents)
    assert torch.equal(batch["context"], contexts)

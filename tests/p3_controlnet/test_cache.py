"""The cache: what the base encodes, kept until its weights or the data change."""

import pytest
import torch

from common.data import to_unit_range
from common.errors import UserError
from common.pairs import Pair
from common.stable_diffusion.base import load_base
from p3_controlnet import cache as module
from p3_controlnet.cache import encode_pairs

PROMPTS = ["red circle", "blue circle", "red circle", "", "Red circle"]


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


@pytest.fixture
def pairs():
    return [Pair(f"{k}.png", f"{k}.png", prompt, f"prompt.json line {k + 1}") for k, prompt in enumerate(PROMPTS)]


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_the_cache_holds_what_the_base_encodes(base, pairs, images, monkeypatch):
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 2)
    cache = encode_pairs(base, pairs, images)
    assert len(cache) == 5
    assert len(cache.contexts) == 4
    latents, contexts = base.encode_images(to_unit_range(images)), base.encode_prompts(PROMPTS)
    assert (cache.latents.float() - latents).abs().max() <= 1e-3 * latents.abs().max()
    assert (cache.contexts[cache.rows].float() - contexts).abs().max() <= 1e-3 * contexts.abs().max()
    assert cache.rows[0] == cache.rows[2]
    assert torch.equal(cache.null_context, cache.contexts[cache.rows[3]])
    index, dropped = torch.tensor([4, 0, 1]), torch.tensor([False, True, False])
    x0, context = cache.take(index, dropped)
    assert x0.dtype == context.dtype == torch.float32
    assert torch.equal(x0, cache.latents[index].float())
    assert (context - base.encode_prompts(["Red circle", "", "blue circle"])).abs().max() <= 1e-3
    assert torch.equal(cache.take(index)[1], cache.contexts[cache.rows[index]].float())


def test_it_is_read_again_in_another_process_and_made_anew_when_anything_changes(
    pipeline_folder, pairs, images, tmp_path, monkeypatch
):
    path = tmp_path / "cache.safetensors"
    base = load_base(pipeline_folder)
    first = encode_pairs(base, pairs, images, path)
    encoded = []
    whole = module.encode
    monkeypatch.setattr(module, "encode", lambda *args: encoded.append(args) or whole(*args))
    for again in (base, load_base(pipeline_folder)):  # one that has padded and cut prompts, and a fresh one
        second = encode_pairs(again, pairs, images, path)
        assert all(torch.equal(vars(first)[name], tensor) for name, tensor in vars(second).items())
    assert not encoded

    other_images = images.clone()
    other_images[4, 2, 63, 63] ^= 1
    other_pairs = [*pairs[:4], Pair("4.png", "4.png", "red  circle", "prompt.json line 5")]
    other_base = load_base(pipeline_folder)
    other_base.vae.decoder.conv_in.weight[0, 0, 0, 0] += 1
    changes = [(base, pairs, other_images), (base, other_pairs, images), (other_base, pairs, images)]
    for count, change in enumerate(changes, start=1):
        encode_pairs(*change, path)
        assert len(encoded) == count
    encode_pairs(*changes[-1], path)
    assert len(encoded) == len(changes)


def test_a_long_prompt_is_named_by_its_first_line(base, images, capsys):
    pairs = [Pair("0.png", "0.png", "x" * 90, f"prompt.json line {k + 4}") for k in range(5)]
    encode_pairs(base, pairs, images)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("warning: prompt.json line 4: prompt of 92 tokens is cut to 77")


def test_a_broken_file_is_named(base, pairs, images, tmp_path):
    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=f"^{path}: not a whole safetensors file"):
        encode_pairs(base, pairs, images, path)
    with pytest.raises(UserError, match="cannot be written"):
        encode_pairs(base, pairs, images, path / "below.safetensors")

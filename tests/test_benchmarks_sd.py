"""The full-size runs of problem 3 on a narrow Stable Diffusion, and the file that stands in for the real one."""

import json
import sys

import pytest
import torch

from benchmarks import sd_full_size
from common.cli import UserError
from latent_diffusion.base import load_base
from tests.programs import run
from tests.stable_diffusion import KEYS, narrow

NARROW = {kind: {name: narrow(name, shape) for name, shape in KEYS[kind].items()} for kind in KEYS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "sd-like.ckpt"
    sd_full_size.write_like(path, NARROW["sd_v1"])
    return path


@torch.no_grad()
def test_the_file_is_like_the_published_one_and_stays_finite(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 470_000
    state = content["state_dict"]
    assert state.keys() == KEYS["sd_v1"].keys() | {"betas", "alphas_cumprod"}
    assert {t.dtype for name, t in state.items() if not name.endswith("position_ids")} == {torch.float32}
    # As the published buffer begins and ends.
    assert state["alphas_cumprod"][[0, -1]].tolist() == pytest.approx([0.99915, 0.0047], rel=0.01)
    base = load_base(checkpoint)
    generator = torch.Generator().manual_seed(0)
    xt, context = torch.randn(1, 4, 16, 16, generator=generator), base.encode_prompts(["red circle"])
    eps = base.unet(xt, torch.tensor([500]), context).sample
    latents = base.encode_images(torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1)
    for tensor in (context, eps, latents, base.decode(latents)):
        assert tensor.isfinite().all()
        assert 1e-2 < tensor.std() < 1e2


@pytest.mark.slow  # four processes that each import everything
def test_every_run_is_measured(tmp_path, monkeypatch):
    (tmp_path / "keys.json").write_text(json.dumps(NARROW))
    monkeypatch.setattr(sd_full_size, "PUBLISHED", tmp_path / "keys.json")
    flags = ["--size", 64, "--precision", "fp32", "--device", "cpu", "--json", tmp_path / "f.json"]
    figures = run(sd_full_size, tmp_path / "sd-like.ckpt", *flags)
    assert json.loads((tmp_path / "f.json").read_text()) == figures
    for name in ("training", "training_with_gradient_checkpointing"):
        step = figures[name]["step"]
        assert step["parameters_in_the_optimizer"] == step["parameters_of_the_controlnet"] > 0
        assert figures[name]["seconds"] > step["seconds"] > 0
    for name in ("first_start", "second_start", "training"):
        assert 0.1 < figures[name]["peak_resident_gb"] < 10


def test_what_a_process_takes_and_why_it_failed():
    # Held long enough to be looked at; Linux counts resident pages a core, and may be some tens of MB behind.
    hold = "import time; data = b'x' * 300_000_000; time.sleep(0.5); print('done')"
    facts, text = sd_full_size.measure([sys.executable, "-c", hold])
    assert text == "done\n"
    assert 0.25 < facts["peak_resident_gb"] < 0.5
    with pytest.raises(UserError, match=r"^-c: exit code 3: error: no$"):
        sd_full_size.measure([sys.executable, "-c", "import sys; print('error:  no', file=sys.stderr); sys.exit(3)"])

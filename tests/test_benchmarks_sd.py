"""The full-size runs of problem 3 on a narrow Stable Diffusion, and the file that stands in for the real one."""

import json
import sys

import pytest
import torch

from benchmarks import make_sd_like, sd_full_size
from common.cli import UserError
from latent_diffusion.base import load_base
from p3_controlnet.model import ControlNet
from tests.stable_diffusion import KEYS, narrow


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The published names with a tenth of the channels."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps({k: {n: narrow(n, shape) for n, shape in KEYS[k].items()} for k in KEYS}))
    return path


@pytest.fixture(scope="module")
def checkpoint(keys, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "sd-like.ckpt"
    return make_sd_like.main(make_sd_like.parse_arguments([str(path), "--keys", str(keys)]))


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


def test_a_controlnet_like_the_published_one(keys, checkpoint, tmp_path):
    arguments = [str(tmp_path / "control.safetensors"), "--kind", "controlnet", "--keys", str(keys)]
    controlnet, _ = ControlNet.load(make_sd_like.main(make_sd_like.parse_arguments(arguments)))
    assert controlnet.config.block_out_channels == (32, 64, 128, 128)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["{tmp}/sd.safetensors"], "{tmp}/sd.safetensors: name a .ckpt file for sd_v1"),
        (["{tmp}/sd.ckpt", "--keys", "{tmp}/absent"], "{tmp}/absent: no list of sd_v1"),
    ],
)
def test_bad_arguments_are_one_clear_line(tmp_path, flags, complaint):
    with pytest.raises(UserError) as error:
        make_sd_like.main(make_sd_like.parse_arguments([flag.format(tmp=tmp_path) for flag in flags]))
    assert complaint.format(tmp=tmp_path) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # four processes that each import everything
def test_every_run_is_measured(keys, checkpoint, tmp_path, capsys):
    flags = ["--keys", keys, "--size", 64, "--precision", "fp32", "--device", "cpu", "--json", tmp_path / "f.json"]
    arguments = [str(word) for word in (checkpoint, "--work", tmp_path / "work", *flags)]
    figures = sd_full_size.main(sd_full_size.parse_arguments(arguments))
    assert json.loads((tmp_path / "f.json").read_text()) == figures
    assert figures == json.loads((printed := capsys.readouterr().out)[printed.index("{") :])
    assert len(list((tmp_path / "work" / "drawn").rglob("*.png"))) == 1
    assert len(list((tmp_path / "work" / "converted").iterdir())) == 1
    assert not (tmp_path / "work" / "run").exists()
    controlnet = ControlNet.load(tmp_path / "work" / "control-like.safetensors")[0]
    count = sum(parameter.numel() for parameter in controlnet.parameters())
    for name in ("training", "training_with_gradient_checkpointing"):
        step = figures[name]["step"]
        assert step["parameters_in_the_optimizer"] == step["parameters_of_the_controlnet"] == count
        assert figures[name]["process"]["seconds"] > step["seconds"] > 0
    for run in (figures["drawing"]["first_start"], figures["drawing"]["second_start"], figures["training"]["process"]):
        assert 0.1 < run["peak_resident_gb"] < 10


def test_what_a_process_takes_and_why_it_failed():
    held = "data = bytearray(300_000_000); print('done')"
    facts, text = sd_full_size.measured([sys.executable, "-c", held])
    assert text == "done\n"
    assert 0.3 <= facts["peak_resident_gb"] < 0.5
    assert facts["seconds"] > 0
    with pytest.raises(UserError, match=r"^-c: exit code 3: error: no$"):
        sd_full_size.measured([sys.executable, "-c", "import sys; print('error:  no', file=sys.stderr); sys.exit(3)"])

"""The face benchmark runs, and its peers do the same work as ours."""

import json

import pytest
import torch

from benchmarks import p2
from common.checkpoint import save_tensors
from common.cli import run
from p2_ddim.model import COURSE, FaceUNet, FaceUNetConfig
from p2_ddim.noise import random_noises
from p2_ddim.sampler import DDIMOptions, FaceSampler

SMALL = FaceUNetConfig(widths=(8, 16), blocks=1, attention=(False, True), embedding=16)


@pytest.fixture
def weights(tmp_path):
    """A small network of random weights that predicts v."""
    torch.manual_seed(0)
    network = p2.StandIn(FaceUNet(SMALL)).network
    facts = COURSE | {"config": SMALL.__dict__, "prediction": "v", "image_size": 16}
    save_tensors(tmp_path / "faces.safetensors", network.state_dict(), facts)
    return tmp_path / "faces.safetensors"


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_peers_draw_our_images(prediction):
    torch.manual_seed(0)
    network, about = p2.StandIn(FaceUNet(SMALL)).eval(), COURSE | {"prediction": prediction}
    noises, steps = random_noises(3, (3, 8, 8), seed=0), 8
    sampler = FaceSampler(network, about, torch.device("cpu"))
    ours = sampler.pictures(noises, DDIMOptions(steps=steps)).int()
    loop = torch.stack([p2.straightforward(network, about, noise, steps, sampler.device) for noise in noises]).int()
    theirs = p2.by_diffusers(sampler, noises, steps, batch_size=2).int()
    assert ours.float().std() > 20
    assert (ours - loop).abs().max() <= 1
    assert (ours - theirs).abs().max() <= 1


def test_the_benchmark_reports_every_figure(weights, tmp_path, capsys):
    flags = ["--images", "3", "--loop-images", "2", "--steps", "2", "--batch-size", "2", "--precision", "fp32"]
    args = p2.parse_arguments(["--weights", str(weights), *flags, "--json", str(tmp_path / "p2.json")])
    figures = p2.main(args)
    assert json.loads((tmp_path / "p2.json").read_text()) == figures == json.loads(capsys.readouterr().out)
    seconds, faster = figures["seconds"], figures["times_faster_than"]
    assert faster["diffusers"] == pytest.approx(seconds["diffusers"] / seconds["ours"])
    assert faster["straightforward"] == pytest.approx(seconds["straightforward"] / seconds["ours"])
    assert max(figures["mean_squared_error_to"].values()) < 0.1
    assert figures["images"] == "3 of 16x16"
    assert figures["peak_memory_gib"] > 0
    assert min(figures["gflops_a_second"].values()) > 0
    assert {"ours", "straightforward", "matrix product, fp32"} <= figures["gflops_a_second"].keys()


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--images", "0"], "--images 0"), (["--loop-images", "11"], "--loop-images 11"), (["--size", "15"], "--size 15")],
)
def test_a_mistake_gives_one_line(weights, flags, word, capsys):
    with pytest.raises(SystemExit):
        run(p2.main, p2.parse_arguments(["--weights", str(weights), *flags]))
    err = capsys.readouterr().err
    assert word in err
    assert err.count("\n") == 1

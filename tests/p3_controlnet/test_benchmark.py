"""The ControlNet benchmark runs, and its peers do the same work as ours."""

import json

import pytest
import torch

from benchmarks import p3
from latent_diffusion.base import load_base
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet import fill50k
from p3_controlnet.model import ControlNet


@pytest.fixture
def circles(tmp_path):
    fill50k.main(fill50k.parse_arguments([str(tmp_path / "data"), "--count", "3", "--size", "64"]))
    return tmp_path / "data"


def test_the_benchmark_reports_every_figure(circles, pipeline_folder, controlnet_folder, tmp_path, capsys):
    flags = ["--pictures", "4", "--steps", "2", "--batch-size", "2", "--precision", "fp32", "--repeats", "1"]
    weights = ["--base", str(pipeline_folder), "--controlnet", str(controlnet_folder), "--examples", str(circles)]
    figures = p3.main(p3.parse_arguments([*weights, *flags, "--json", str(tmp_path / "p3.json")]))
    assert json.loads((tmp_path / "p3.json").read_text()) == figures
    assert figures == json.loads(capsys.readouterr().out)
    assert figures["mean_difference_of_255"] <= 0.1
    seconds = figures["sampling_seconds"]
    assert figures["times_faster_than"]["diffusers"] == pytest.approx(seconds["diffusers"] / seconds["ours"])


def test_both_training_steps_are_the_same_step(circles, pipeline_folder, controlnet_folder):
    pairs = read_pairs(circles / "prompt.json")
    images, hints = (read_hints(pairs, circles, 64, field) for field in ("target", "source"))
    losses = []
    for which in (0, 1):
        controlnet = ControlNet.load(controlnet_folder)[0].train()
        step = p3.training_steps(load_base(pipeline_folder), controlnet, pairs, images, hints, "fp32")[which]
        losses.append([step().item() for _ in range(3)])
    assert torch.tensor(losses[0]).sub(torch.tensor(losses[1])).abs().max() < 1e-4
    assert len(set(losses[0])) == 3

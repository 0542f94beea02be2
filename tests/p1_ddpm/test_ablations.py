"""Ablations of problem 1 end to end with tiny networks, and separate embeddings as a special joint table."""

import pytest
import torch
from torch import nn

from benchmarks import ablations
from benchmarks.ablations_p1 import joint_state, make_separate
from common.training import Trainer
from p1_ddpm import evaluate
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from tests.programs import run

SMALL = ContextUNetConfig(widths=(8, 16), blocks=(1, 1), embedding=16)


def measure(*arguments):
    return run(ablations, *arguments)["rows"]


@pytest.fixture
def drawn(striped_digits, tiny_digit_weights):
    return "--weights", tiny_digit_weights, "--data", striped_digits, "--count", 1


def test_separate_embeddings_are_a_joint_table_of_sums():
    torch.manual_seed(0)
    separate, joint = make_separate(SMALL).eval(), ContextUNet(SMALL).eval()
    for parameter in separate.parameters():
        nn.init.normal_(parameter, std=0.3)
    joint.load_state_dict(joint_state(separate))
    generator = torch.Generator().manual_seed(1)
    xt, t, labels = torch.randn(21, 3, 28, 28, generator=generator), torch.arange(21) * 40, torch.arange(21)
    with torch.no_grad():
        assert torch.equal(separate(xt, t, labels), joint(xt, t, labels))
    rows = joint.context.weight.detach()
    mnistm, svhn, null = rows[:10], rows[10:20], rows[20]
    # One digit is from another as far in both domains.
    assert ((mnistm - mnistm[0]) - (svhn - svhn[0])).abs().max() < 1e-5
    assert (mnistm - svhn).abs().max() > 0.1
    assert (rows[:20] - null).abs().amax(dim=1).min() > 0.1


def test_guidance_is_what_evaluate_measures(drawn):
    rows = measure("p1-guidance", *drawn, "--scales", 1, 3)
    assert [row["variant"] for row in rows] == ["1", "3", "real images"]
    result = run(evaluate, *drawn, "--seeds", 21, "--layout", "2024", "--guidance-scale", 3)
    (figures,), yardsticks = result["sets"], result["yardsticks"]
    for domain, name in {"mnistm": "MNIST-M", "svhn": "SVHN"}.items():
        for heading, figure in {"right": "accuracy", "recall": "recall", "Frechet": "frechet"}.items():
            assert rows[1][f"{heading}, {name}"] == pytest.approx(figures[domain][figure], abs=1e-6)
        assert rows[2][f"right, {name}"] == yardsticks[domain]["held_out_images"]["accuracy"]
        assert rows[2][f"recall, {name}"] == pytest.approx(yardsticks[domain]["training_images"]["recall"], abs=1e-6)
    assert rows[0] != rows[1] | {"variant": "1"}
    # The same way to draw, found by the other ablations.
    assert measure("p1-interval", *drawn, "--scale", 3)[0] == rows[1] | {"variant": "0 to 1000"}
    assert measure("p1-steps", *drawn, "--scale", 3, "--steps", 10)[0] == rows[1] | {"variant": "dpm-solver++, 10"}


def test_classes_are_trained_once_and_measured_again(striped_digits, tmp_path, monkeypatch):
    flags = ["--data", striped_digits, "--count", 1, "--training-steps", 8, "--batch-size", 4, "--widths", 8, 16]
    rows = measure("p1-classes", *flags, "--out", tmp_path / "runs")
    assert rows[0]["validation loss"] != rows[1]["validation loss"] > 0
    assert "validation loss" not in rows[2]
    monkeypatch.setattr(Trainer, "take_step", None)
    assert measure("p1-classes", *flags, "--out", tmp_path / "runs") == rows

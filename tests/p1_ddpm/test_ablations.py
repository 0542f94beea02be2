"""Ablations of problem 1 end to end with tiny networks, and separate embeddings as a special joint table."""

import pytest
import torch
from torch import nn

from benchmarks import ablations
from benchmarks.ablations_p1 import SeparateUNet, joint_state
from common.cli import UserError
from common.training import Trainer
from p1_ddpm import evaluate
from p1_ddpm.model import ContextUNet, ContextUNetConfig

SMALL = ContextUNetConfig(widths=(8, 16), blocks=(1, 1), embedding=16)


def measured(*arguments):
    return ablations.main(ablations.parse_arguments([str(argument) for argument in arguments]))["rows"]


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_separate_embeddings_are_a_joint_table_of_sums():
    separate, joint = randomised(SeparateUNet(SMALL)), ContextUNet(SMALL).eval()
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


def test_separate_embeddings_start_as_wide_as_joint_ones():
    torch.manual_seed(0)
    config = ContextUNetConfig(widths=(8, 16), blocks=(1, 1), embedding=4096)
    tables = [ContextUNet(config).context.weight, SeparateUNet(config).context(torch.arange(21))]
    assert abs(tables[0].std() - tables[1].std()) < 0.02


@pytest.fixture
def drawn(striped_digits, tiny_digit_weights):
    return "--weights", tiny_digit_weights, "--data", striped_digits, "--count", 1


def test_guidance_is_what_evaluate_measures(drawn, striped_digits, tiny_digit_weights):
    rows = measured("p1-guidance", *drawn, "--scales", 1, 3)
    assert [row["variant"] for row in rows] == ["1", "3", "real images"]
    flags = ["--weights", tiny_digit_weights, "--data", striped_digits, "--count", 1, "--seeds", 21, "--layout", "2024"]
    args = evaluate.parse_arguments([str(flag) for flag in [*flags, "--guidance-scale", 3, "--steps", 10]])
    (expected,) = evaluate.main(args)
    for domain in ("mnistm", "svhn"):
        for name in ("accuracy", "frechet", "recall"):
            assert rows[1][f"{domain}_{name}"] == pytest.approx(expected[domain][name], abs=1e-6)
        assert rows[2][f"{domain}_recall"] == pytest.approx(expected[domain]["yardstick"]["recall"], abs=1e-6)
        assert rows[2][f"{domain}_accuracy"] == expected[domain]["judge_held_out_accuracy"]
    assert rows[0] != rows[1] | {"variant": "1"}


def test_guidance_everywhere_is_the_whole_interval(drawn):
    rows = {row.pop("variant"): row for row in measured("p1-interval", *drawn, "--scale", 3)}
    (whole, _) = measured("p1-guidance", *drawn, "--scales", 3)
    assert rows["0 to 1000"] == {name: value for name, value in whole.items() if name != "variant"}
    assert len({tuple(row.items()) for row in rows.values()}) == len(rows) == 8


def test_every_sampler_takes_every_number_of_steps(drawn):
    rows = measured("p1-steps", *drawn, "--steps", 1, 3)
    names = [f"{name}, {steps}" for name in ("dpm-solver++", "ddim", "ddpm") for steps in (1, 3)]
    assert [row["variant"] for row in rows] == [*names, "real images"]
    # With one step to a clean image all three are the predicted x0.
    ones = [{name: value for name, value in row.items() if name != "variant"} for row in rows[0:6:2]]
    assert pytest.approx(ones[0]) == ones[1]
    assert pytest.approx(ones[0]) == ones[2]
    assert all(row["svhn_frechet"] >= 0 for row in rows)


def test_classes_are_trained_once_and_measured_again(striped_digits, tmp_path, monkeypatch):
    flags = ["--data", striped_digits, "--count", 1, "--training-steps", 8, "--batch-size", 4, "--widths", 8, 16]
    flags += ["--lr", 0.1]  # layers that start at zero keep the labels out of the first steps
    rows = measured("p1-classes", *flags, "--out", tmp_path / "runs")
    assert [row["variant"] for row in rows] == ["joint: 20 rows", "separate: 2 + 10 rows", "real images"]
    assert rows[0]["loss"] > 0
    assert rows[0]["loss"] != rows[1]["loss"]
    assert "loss" not in rows[2]
    monkeypatch.setattr(Trainer, "take_step", None)
    assert measured("p1-classes", *flags, "--out", tmp_path / "runs") == rows


def test_bad_settings_are_told(drawn, digits, tmp_path):
    with pytest.raises(UserError, match="--count 0: starts at 1"):
        measured("p1-guidance", *drawn[:4], "--count", 0)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "svhn").symlink_to(digits / "svhn")
    with pytest.raises(UserError, match="has no mnistm"):
        measured("p1-classes", "--data", tmp_path / "digits", "--count", 1, "--out", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()

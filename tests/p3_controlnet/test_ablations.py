"""Ablations of problem 3 end to end with a tiny base: what is changed, how it is measured, and runs kept."""

import pytest
import torch

from benchmarks import ablations, ablations_p3
from benchmarks.ablations_p3 import NoHint, PooledHint, without_zeros
from common.cli import UserError
from common.runtime import seeded_generator
from common.training import Trainer, diffusion_loss
from latent_diffusion.drawing import called_with_context
from p3_controlnet import watch
from p3_controlnet.model import ControlNet


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(ablations_p3, "WATCHED", 2)
    monkeypatch.setattr(ablations_p3, "VALIDATED", 4)
    monkeypatch.setattr(watch, "STEPS", 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder that keeps the runs of all tests here."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def measured(pipeline_folder, runs):
    flags = ["--base", pipeline_folder, "--out", runs, "--steps", 3, "--batch-size", 2, "--pairs", 44]
    flags += ["--hint-channels", 4, 6, 8, 10]

    def measured(name, *more):
        arguments = [str(argument) for argument in (name, *flags, *more)]
        return ablations.main(ablations.parse_arguments(arguments))["rows"]

    return measured


def test_a_pooled_hint_is_the_mean_over_a_latents_pixels():
    pooled = PooledHint(3, 4, 3)
    hint = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert not pooled(hint).any(), "it starts at zero, as the hint encoder does"
    torch.nn.init.dirac_(pooled.conv.weight)
    means = hint.reshape(2, 3, 2, 4, 3, 4).mean(dim=(3, 5))
    assert (pooled(hint) - means).abs().max() < 1e-6
    assert NoHint(4, 5)(hint).shape == (2, 5, 2, 3)


def test_ordinary_convolutions_add_something_at_once(unet, batch):
    torch.manual_seed(0)
    controlnet = without_zeros(ControlNet.from_unet(unet, (4, 6, 8, 10)))
    residuals = controlnet(**batch)
    assert all(residual.abs().mean() > 1e-3 for residual in residuals)
    other = controlnet(**batch | {"hint": 1 - batch["hint"]})
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(residuals, other))


def test_what_is_left_out_shows_and_runs_are_kept(measured, pipeline_folder, runs, monkeypatch):
    built, ordinary = measured("p3-zero")
    assert (built["variant"], ordinary["variant"]) == ("as built", "ordinary convolutions")
    # New zero convolutions add nothing: the loss is the base's own.
    flags = ["p3-zero", "--base", pipeline_folder, "--out", runs, "--pairs", 44, "--hint-channels", 4, 6, 8, 10]
    args = ablations.parse_arguments([str(flag) for flag in flags])
    workshop = ablations_p3.Workshop(vars(args))
    held_out = workshop.batches(True, 4, 0.0, 0)(0, seeded_generator(0, 3))
    del held_out["hint"]
    base = workshop.base
    own = diffusion_loss(called_with_context(base.unet), held_out, base.schedule, base.prediction, gamma=0.0)
    assert built["loss_before"] == pytest.approx(float(own), rel=0.01)
    assert abs(ordinary["loss_before"] - float(own)) > 10 * abs(built["loss_before"] - float(own))
    for row in (built, ordinary):
        assert all(0 <= row[f"hint_iou_{k}"] <= 1 for k in (1, 2, 3))
        assert row["loss"] > 0
    again, pooled, nothing = measured("p3-hint")
    assert again == built
    assert nothing["condition_sensitivity"] == 0 < pooled["condition_sensitivity"]
    assert len([path for path in runs.iterdir() if (path / "metrics.jsonl").exists()]) == 4
    monkeypatch.setattr(Trainer, "take_step", None)
    assert measured("p3-hint") == [again, pooled, nothing]


def test_bad_settings_are_told(measured):
    with pytest.raises(UserError, match="--pairs 10: at least 3, 1 and 11"):
        measured("p3-zero", "--pairs", 10)
    with pytest.raises(UserError, match="fold 4 pixels, the base 8"):
        measured("p3-zero", "--hint-channels", 4, 6, 8)

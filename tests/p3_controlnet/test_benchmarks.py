"""Benchmarks of problem 3 with a tiny base: the speed program's peer, and ablations end to end."""

from dataclasses import replace

import pytest

from benchmarks import ablations, ablations_p3, speed
from common.cli import UserError
from common.training import Trainer
from p3_controlnet import watch
from p3_personalization import custom_diffusion
from tests.programs import run


def test_diffusers_pipeline_draws_our_pictures(pipeline_folder, controlnet_folder, circles):
    flags = ["--images", 4, "--steps", 2, "--batch-size", 2, "--precision", "fp32", "--repeats", 1]
    weights = ["--base", pipeline_folder, "--controlnet", controlnet_folder, "--examples", circles]
    figures = run(speed, "p3", *weights, *flags)
    assert figures["difference"]["diffusers"]["mean"] <= 0.1
    assert figures["times_ours"].keys() == {"ours", "diffusers"}


@pytest.fixture
def few(monkeypatch, pipeline_folder):
    monkeypatch.setitem(ablations_p3.CONTROLNET, "watched", 2)
    monkeypatch.setitem(ablations_p3.CONTROLNET, "validated", 4)
    monkeypatch.setattr(watch, "STEPS", 2)
    monkeypatch.setattr(ablations_p3, "DRAWING", replace(ablations_p3.DRAWING, steps=2))
    monkeypatch.setattr(ablations_p3, "CLASS_IMAGES", 3)
    monkeypatch.setattr(custom_diffusion, "CLASS_STEPS", 2)
    monkeypatch.setattr(custom_diffusion, "BASE", pipeline_folder.resolve())
    # The tiny base has a token a letter.
    monkeypatch.setattr(ablations_p3, "STARTS", {"0": "p", "1": "o"})


@pytest.fixture
def measure(few, pipeline_folder, tmp_path):
    def measure(name, *more):
        return run(ablations, name, "--base", pipeline_folder, "--out", tmp_path / "runs", *more)["rows"]

    return measure


def test_what_is_left_out_shows_and_runs_are_kept(measure, monkeypatch):
    small = "--steps", 3, "--batch-size", 2, "--pairs", 44, "--size", 64
    built, ordinary = measure("p3-zero", *small)
    assert (built["variant"], ordinary["variant"]) == ("as built", "ordinary convolutions")
    again, pooled, nothing = rows = measure("p3-hint", *small)
    assert again == built
    # What starts at zero adds nothing: the loss is the base's own.
    assert built["loss before"] == pooled["loss before"] == nothing["loss before"] != ordinary["loss before"]
    assert nothing["sensitivity"] == 0 < pooled["sensitivity"]
    assert all(0 <= row[heading] <= 1 for row in (*rows, ordinary) for heading in ablations_p3.IOU)
    monkeypatch.setattr(Trainer, "take_step", None)
    assert measure("p3-hint", *small) == rows
    with pytest.raises(UserError, match="--steps 2: must be at least 3"):
        measure("p3-zero", "--steps", 2)


def test_words_alone_change_nothing_else(measure, monkeypatch):
    small = "--steps", 2, "--batch-size", 4, "--count", 2
    rows = measure("p3-prior", *small)
    changes = [row["change of ordinary prompts"] for row in rows]
    assert changes[0] == 0 < min(changes[1:])
    assert changes[1] != changes[2]
    assert all(0 <= row["within 10"] <= 1 for row in rows)
    monkeypatch.setattr(Trainer, "take_step", None)
    assert measure("p3-prior", *small) == rows

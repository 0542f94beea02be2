"""Ablations of problem 2 end to end with a tiny network: what must be zero is, and lengths are what geometry says."""

import math
from itertools import pairwise

import pytest

from benchmarks import ablations
from p2_ddim import sample
from p2_ddim.noise import read_noises
from tests.programs import run


@pytest.fixture
def measure(face_weights, noise_folder):
    source = "--weights", face_weights, "--noise", noise_folder
    return lambda name, *arguments: run(ablations, name, *source, *arguments)["rows"]


def test_as_many_steps_as_the_reference_are_the_reference(measure):
    few, whole = measure("p2-steps", "--steps", 2, 8, "--reference", 8)
    assert (few["variant"], whole["variant"]) == (2, 8)
    assert whole["trailing"] == 0 < min(few["trailing"], few["leading"], whole["leading"])


def test_without_eta_nothing_moves(measure):
    still, fresh = measure("p2-eta", "--etas", 0, 1, "--steps", 4)
    assert still["from eta 0"] == still["between two seeds"] == 0 < still["deviation of pixels"]
    assert min(fresh["from eta 0"], fresh["between two seeds"]) > 1


def test_the_conventions_are_those_of_the_ground_truth(measure, face_weights, noise_folder, tmp_path):
    run(sample, noise_folder, tmp_path / "GT", face_weights, "--steps", 4)
    kept, *left_out = measure("p2-conventions", "--truth", tmp_path / "GT", "--steps", 4)
    assert kept["mean"] == kept["largest"] == 0
    assert len(left_out) == 4
    assert all(row["largest"] >= row["mean"] > 0 for row in left_out), left_out


def test_lengths_are_those_of_the_circle_and_of_the_line(measure, noise_folder):
    first, middle, last = measure("p2-slerp", "--alphas", 0, 0.5, 1, "--steps", 2)
    noises = [noise.xt.double() for noise in read_noises(noise_folder, 3, 4)]
    shell = math.sqrt(noises[0].numel())
    straight = [float((a + b).norm()) / 2 / shell for a, b in pairwise(noises)]
    assert middle["length, lerp"] == pytest.approx(sum(straight) / 3, abs=1e-5)
    # On the great circle's middle: the half of a + b, over the cosine of half the angle.
    halves = [math.acos(float((a * b).sum() / a.norm() / b.norm())) / 2 for a, b in pairwise(noises)]
    round_ = [length / math.cos(half) for length, half in zip(straight, halves)]
    assert middle["length, slerp"] == pytest.approx(sum(round_) / 3, abs=1e-5)
    for row, ends in ((first, noises[:-1]), (last, noises[1:])):
        mean = sum(float(xt.norm()) for xt in ends) / 3 / shell
        assert row["length, slerp"] == row["length, lerp"] == pytest.approx(mean, abs=1e-5)
        assert row["deviation of pixels, slerp"] == row["deviation of pixels, lerp"] > 0
    assert middle["deviation of pixels, slerp"] != middle["deviation of pixels, lerp"]

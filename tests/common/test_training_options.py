"""Training flags and the learning rate they describe."""

import math
from itertools import pairwise

import pytest
import torch

from common.cli import Parser, UserError
from common.training_options import TrainingOptions, add_training_arguments, learning_rate, training_options


def parse(*flags, **defaults):
    parser = Parser(prog="train.py")
    add_training_arguments(parser, **defaults)
    return training_options(parser.parse_args(flags))


def test_flags_are_the_options():
    assert parse() == TrainingOptions()
    options = parse("--steps", "7", "--lr", "1e-3", "--compile", "--decay", "cosine", batch_size=64)
    assert options == TrainingOptions(steps=7, lr=1e-3, compile=True, decay="cosine", batch_size=64)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--steps", "0"], "--steps 0: must be above 0"),
        (["--batch-size", "-4"], "--batch-size -4: must be above 0"),
        (["--lr", "nan"], "--lr nan: must be above 0"),
        (["--save-every", "0"], "--save-every 0: must be above 0"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--ema", "1"], "--ema 1.0: must be at least 0 and below 1"),
        (["--decay-fraction", "1.5"], "--decay-fraction 1.5: must be between 0 and 1"),
    ],
)
def test_values_out_of_range_are_refused(flags, complaint):
    with pytest.raises(UserError) as caught:
        parse(*flags)
    assert str(caught.value) == complaint


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_rises_stays_and_falls(decay):
    options = TrainingOptions(steps=1000, lr=2.0, warmup=100, decay=decay, decay_fraction=0.4)
    rates = [learning_rate(options, step) for step in range(1000)]
    assert rates[:100] == pytest.approx([2 * (step + 1) / 100 for step in range(100)])
    assert rates[100:601] == pytest.approx([2.0] * 501)
    assert all(after < before for before, after in pairwise(rates[601:970]))
    middle = {"linear": 1.0, "cosine": 2 * (0.5 - 0.5 * math.cos(math.pi * 0.5))}[decay]
    assert rates[800] == pytest.approx(middle)
    assert rates[700] == pytest.approx({"linear": 1.5, "cosine": 2 * (0.5 + 0.5 * math.sqrt(0.5))}[decay])
    assert rates[-1] == pytest.approx(0.02)


def test_no_warm_up_and_no_decay_leave_the_peak():
    options = TrainingOptions(steps=10, lr=3.0, warmup=0, decay_fraction=0.0)
    assert [learning_rate(options, step) for step in range(10)] == [3.0] * 10


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1, 2**64 + 1, 10**30])
def test_seeds_of_any_size_draw_initial_weights(seed):
    TrainingOptions(seed=seed).seed_weights()
    assert torch.initial_seed() % 2**64 == seed % 2**64

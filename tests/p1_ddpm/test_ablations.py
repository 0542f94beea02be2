"""Ablations of problem 1 end to end with tiny networks."""

import pytest

from benchmarks import ablations
from p1_ddpm import evaluate
from tests.programs import run


def measure(*arguments):
    return run(ablations, *arguments)["rows"]


@pytest.fixture
def drawn(striped_digits, tiny_digit_weights):
    return "--weights", tiny_digit_weights, "--data", striped_digits, "--count", 1


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

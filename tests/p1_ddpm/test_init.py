"""Training that starts from finished weights."""

import pytest
import torch

from common.checkpoint import load_tensors
from common.cli import UserError
from p1_ddpm.train import main, parse_arguments

SMALL = ["--image-size", "8", "--widths", "8", "16", "--blocks", "1", "1", "--batch-size", "8", "--precision", "fp32"]


def train(digits, out, *flags):
    return main(parse_arguments(["--data", str(digits), "--out", str(out), *SMALL, *flags]))


def test_init_starts_from_finished_weights(digits, tmp_path):
    """With a learning rate of next to nothing, the weights that come out are those that went in."""
    source = train(digits, tmp_path / "first", "--steps", "3", "--lr", "1e-2")
    still = ["--steps", "1", "--lr", "1e-12", "--seed", "5"]
    path = train(digits, tmp_path / "second", *still, "--init", str(source))
    (before, _), (after, about) = load_tensors(source), load_tensors(path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert about["training"]["init"] == str(source)
    other = load_tensors(train(digits, tmp_path / "third", *still))[0]
    assert not all(torch.equal(before[name], other[name]) for name in before)


def test_init_must_fit(digits, tmp_path, tiny_digit_weights):
    with pytest.raises(UserError, match="no such weights file"):
        train(digits, tmp_path, "--init", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="does not fit ContextUNet"):
        train(digits, tmp_path, "--init", str(tiny_digit_weights))
    with pytest.raises(UserError, match="its prediction is v, not eps"):
        train(digits, tmp_path, "--init", str(tiny_digit_weights), "--prediction", "eps")

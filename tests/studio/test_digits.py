"""The digits tab draws what sample.py writes, and keeps the whole way there."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from p1_ddpm import sample
from studio.digits import Digits, show

OPTIONS = {"domain": "svhn", "label": 7, "count": 6, "guidance_scale": 3.0, "method": "ddim", "steps": 3, "seed": 5}


@pytest.fixture
def digits(tiny_digit_weights) -> Digits:
    return Digits(tiny_digit_weights, torch.device("cpu"), "fp32")


def cells(picture: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The images in a picture of the page: (rows, columns, 28, 28, 3)."""
    side = 112 + 2
    pixels = np.asarray(picture)
    assert pixels.shape == (rows * side + 2, columns * side + 2, 3)
    parts = pixels[2:, 2:].reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return parts[:, :, :112:4, :112:4]


def test_the_end_is_what_sample_writes(digits, tiny_digit_weights, tmp_path, last):
    flags = ["--layout", "2024", "--classes", "7", "--count", "6", "--guidance-scale", "3", "--sampler", "ddim"]
    flags += ["--steps", "3", "--seed", "5", "--precision", "fp32", "--device", "cpu"]
    sample.main(sample.parse_arguments([str(tmp_path), *flags, "--weights", str(tiny_digit_weights)]))
    moments, _ = last(digits.draw(**OPTIONS))
    (caption, xt), (_, x0) = show(moments, 3)
    assert caption == "the end: images"
    drawn = cells(xt, 2, 4).reshape(8, 28, 28, 3)
    for k in range(6):
        assert np.array_equal(drawn[k], np.asarray(Image.open(tmp_path / "svhn" / f"7_{k + 1:03d}.png"))), k
    assert (drawn[6:] == 255).all()
    assert np.array_equal(np.asarray(xt), np.asarray(x0))


def test_the_way_goes_from_noise_to_image(digits, last):
    moments, _ = last(digits.draw(**OPTIONS))
    assert [moment.t for moment in moments] == [999, 666, 332, None]
    noise = moments[0].xt.float()
    # Standard normal noise in [-1, 1]: a third lies outside and is cut, the rest is symmetric.
    assert abs(float(noise.mean()) - 127.5) < 3
    assert abs(float(((noise == 0) | (noise == 255)).float().mean()) - 0.317) < 0.02
    x0 = moments[2].x0.float()
    assert float((x0 - moments[3].xt).abs().mean()) < float((noise - moments[3].xt).abs().mean())
    captions = [[caption for caption, _ in show(moments, position)] for position in (0, 2.0, 99, -1, None)]
    assert captions == [
        ["xt at t = 999", "the x0 predicted from it"],
        ["xt at t = 332", "the x0 predicted from it"],
        ["the end: images", "the same"],
        ["xt at t = 999", "the x0 predicted from it"],
        ["xt at t = 999", "the x0 predicted from it"],
    ]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"domain": "emnist"}, "^domain emnist: choose mnistm, svhn$"),
        ({"label": 10}, "^digit 10: choose from 0 to 9$"),
        ({"label": None}, "^digit is empty"),
        ({"count": 17}, "^images 17: choose from 1 to 16$"),
        ({"guidance_scale": -1}, "^guidance -1"),
        ({"method": "euler"}, "^sampler euler"),
        ({"steps": 0}, "^steps 0"),
        ({"steps": 2.5}, r"^steps 2\.5: choose a whole number$"),
        ({"seed": -1}, "^seed -1"),
        ({"seed": None}, "^seed is empty"),
    ],
)
def test_bad_input(digits, wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        next(digits.draw(**OPTIONS | wrong))


def test_missing_weights(tmp_path):
    digits = Digits(tmp_path / "none.safetensors", torch.device("cpu"), "fp32")
    with pytest.raises(UserError, match="no such weights file"):
        next(digits.draw(**OPTIONS))

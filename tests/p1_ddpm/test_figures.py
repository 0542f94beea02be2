"""The figures hold the pixels that sample.py would write, in the places that their captions say."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors, save_tensors
from common.cli import UserError
from common.sampling import Step
from p1_ddpm import digits, figures
from p1_ddpm.digits import Digit
from p1_ddpm.sample import DigitOptions, DigitSampler
from tests.programs import read, run

GRIDS = {
    "grid_2024_mnistm.png": ["mnistm"] * 10,
    "grid_2024_svhn.png": ["svhn"] * 10,
    "grid_2025.png": ["mnistm", "svhn"] * 5,
}
NAMES = [*GRIDS, "guidance.png", "reverse_process.gif", "reverse_process.png"]


def draw(out, weights, *flags):
    given = "--steps 1 --precision fp32 --device cpu --guidance-scale 3".split()
    return run(figures, "--out", out, "--weights", weights, *given, *flags)


def cells(picture: np.ndarray, rows: int, columns: int, scale: int, right: int = 0) -> np.ndarray:
    """The images of a captioned grid, at its lower right corner: (rows, columns, 28, 28, 3)."""
    side = 28 * scale + 2
    bottom, end = picture.shape[0], picture.shape[1] - right
    inner = picture[bottom - rows * side : bottom, end - columns * side : end]
    inner = inner.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return inner[:, :, : 28 * scale : scale, : 28 * scale : scale]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny_digit_weights, striped_digits):
    out = tmp_path_factory.mktemp("figures")
    paths = draw(out, tiny_digit_weights, "--data", striped_digits)
    assert sorted(paths) == sorted(out.iterdir()) == [out / name for name in NAMES]
    return out


@pytest.fixture(scope="module")
def sampler(tiny_digit_weights):
    return DigitSampler(tiny_digit_weights, "cpu", "fp32")


def images(draws, digits, guidance_scale, **options):
    """What sample.py would write: uint8 (N, 28, 28, 3)."""
    options = DigitOptions(**{"steps": 1, "guidance_scale": guidance_scale} | options)
    return torch.stack([image for _, image in draws.images(digits, options)]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", GRIDS)
def test_grids_have_a_digit_a_row_and_real_images_at_the_right(drawn, sampler, stripes, name):
    picture, domains = read(drawn / name), GRIDS[name]
    found = cells(picture, 10, 10, 3, right=28 * 3 + 4)
    for row in (0, 7):
        row_of = [Digit(domains[row], row, number) for number in range(1, 11)]
        assert np.array_equal(found[row], images(sampler, row_of, 3.0))
    real = cells(picture, 10, 1, 3)[:, 0]
    held = stripes.split()[1]
    for digit in range(10):
        examples = held.images[held.labels == digit].permute(0, 2, 3, 1).numpy()
        assert (real[digit] == examples).all(axis=(1, 2, 3)).any()


def test_guidance_rows_start_from_the_same_noise(drawn, sampler):
    found = cells(read(drawn / "guidance.png"), 5, 10, 3)
    ten = [Digit("svhn" if label % 2 else "mnistm", label, 1) for label in range(10)]
    for row, scale in ((0, 1.0), (3, 6.0)):
        assert np.array_equal(found[row], images(sampler, ten, scale))


def test_the_reverse_process_ends_in_the_first_digits(drawn, sampler):
    found = cells(read(drawn / "reverse_process.png"), 4, 6, 4)
    first = [Digit("mnistm", 0, 1), Digit("svhn", 1, 1)]
    expected = images(sampler, first, 3.0, sampler="ddim", steps=50)
    assert np.array_equal(found[::2, 5], expected)
    with Image.open(drawn / "reverse_process.gif") as gif:
        assert gif.n_frames == 51
        gif.seek(50)
        assert gif.info["duration"] > 1000
        last = np.asarray(gif.convert("RGB"))
    # GIFs have 256 colours, so the last frame is only near the images: left the 0, right the 1.
    zero = last[-4 - 28 * 5 : -4 : 5, 4 : 4 + 28 * 5 : 5].astype(int)
    assert np.abs(zero - expected[0]).mean() < 12
    assert np.abs(zero - expected[1]).mean() > 24


def test_snapshots_pair_xt_with_the_x0_predicted_from_it():
    """Constant images: xt is 0.0 and falls by 0.01 a step; the x0 of the step from t = 9 - i is 0.5 + 0.01 i."""
    both = torch.ones(2, 3, 28, 28)
    steps = [Step(9 - i, both * -0.01 * (i + 1), both * (0.5 + 0.01 * i)) for i in range(10)]
    picture = figures.draw_snapshots(figures.find_moments(both * 0.0, steps))
    found = cells(picture.permute(1, 2, 0).numpy(), 4, 6, 4)[..., 0, 0, 0]

    def level(value):
        return int((value + 1) / 2 * 255 + 0.5)

    moments = [0, 2, 4, 6, 8, 10]
    xt = [level(-0.01 * i) for i in moments]
    x0 = [level(0.5 + 0.01 * i) for i in moments[:-1]] + [level(-0.1)]
    assert found.tolist() == [xt, x0, xt, x0]


def test_without_data_the_real_column_is_left_out(tmp_path, tiny_digit_weights, drawn, monkeypatch, capsys):
    monkeypatch.setattr(digits, "DATA", tmp_path / "none")
    draw(tmp_path / "out", tiny_digit_weights)
    assert "nothing is compared with real images" in capsys.readouterr().out
    without, beside = (read(folder / "grid_2025.png") for folder in (tmp_path / "out", drawn))
    assert np.array_equal(cells(without, 10, 10, 3), cells(beside, 10, 10, 3, right=28 * 3 + 4))


def test_bad_input_leaves_nothing_behind(tmp_path, tiny_digit_weights):
    state, about = load_tensors(tiny_digit_weights)
    flowers = tmp_path / "flowers.safetensors"
    save_tensors(flowers, state, about | {"domains": {"flowers": 20}})
    with pytest.raises(UserError, match="draws flowers, not the digits"):
        draw(tmp_path / "out", flowers)
    with pytest.raises(UserError, match=r"elsewhere: holds neither"):
        draw(tmp_path / "out", tiny_digit_weights, "--data", tmp_path / "elsewhere")
    assert list((tmp_path / "out").iterdir()) == []

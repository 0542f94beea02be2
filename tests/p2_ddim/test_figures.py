"""The report's figures, drawn with a tiny network: what stands where, and the ways between noises."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from p2_ddim import figures
from p2_ddim.noise import Noise, slerp
from p2_ddim.sample import make_sampler, noises_for
from tests.programs import parse, read


@pytest.fixture
def arguments(noise_folder, face_weights, tmp_path):
    paths = "--noise", noise_folder, "--weights", face_weights, "--out", tmp_path / "out"
    return lambda *flags: parse(figures, *paths, "--steps", 2, *flags)


def test_all_figures(arguments, tmp_path):
    files = figures.main(arguments("--faces", "12", "--frames", "3"))
    names = ["eta.png", "faces.png", "lengths.png", "strip_lerp.png", "strip_slerp.png", "walk.gif"]
    assert files == [tmp_path / "out" / name for name in names]
    assert sorted((tmp_path / "out").iterdir()) == files
    assert read(tmp_path / "out" / "faces.png").shape == (2 * 18 + 2, 10 * 18 + 2, 3)
    with Image.open(tmp_path / "out" / "walk.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (4 * 3, (128, 128), 0)


def test_both_strips_have_the_same_ends_and_differ_between(arguments, tmp_path):
    def strips(*flags):
        figures.main(arguments("--only", "strips", *flags))
        return [read(tmp_path / "out" / f"strip_{method}.png")[-128:] for method in ("slerp", "lerp")]

    sphere, line = strips("--between", "02", "00")
    assert sphere.shape == line.shape
    same = (sphere == line).all(axis=(0, 2))
    assert same[:128].all()
    assert same[-128:].all()
    assert not same.all()
    first, _ = strips()  # from 00 to 01
    assert np.abs(first[:, 2:130] - sphere[:, -130:-2]).max() <= 1


def test_the_grid_has_a_row_an_eta_and_a_column_a_noise(arguments, noise_folder):
    sampler, options = make_sampler(arguments("--seed", "5"))
    noises = noises_for(sampler, noise_folder)
    picture = figures.draw_etas(sampler, noises, options).permute(1, 2, 0)[-5 * 130 - 2 :, -4 * 130 - 2 :]
    for row, eta in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        for column, face in enumerate(sampler.pictures(noises, replace(options, eta=eta))):
            top, left = 2 + 130 * row, 2 + 130 * column
            assert torch.equal(picture[top : top + 128 : 8, left : left + 128 : 8], face.permute(1, 2, 0))


def test_the_walk_goes_along_slerp_through_all_and_back():
    a, b, c = noises = [Noise(f"{k:02d}", torch.randn(3, 8, 8)) for k in range(3)]
    seen = []

    class Sampler:
        def pictures(self, path, options):
            seen.extend(noise.xt for noise in path)
            return torch.zeros(len(path), 3, 8, 8, dtype=torch.uint8)

    frames = figures.draw_walk(Sampler(), noises, 2, None)
    expected = [a.xt, slerp(a.xt, b.xt, 0.5), b.xt, slerp(b.xt, c.xt, 0.5), c.xt, slerp(c.xt, a.xt, 0.5)]
    assert len(frames) == len(seen) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--between 00 77", "--between 77"),
        ("--frames 0", "--frames 0"),
        ("--faces 0", "--faces 0"),
        ("--eta -1", "--eta -1"),
        ("--noise noise/00.pt --only walk", "00.pt: holds one noise"),
    ],
)
def test_a_mistake_gives_one_line_and_writes_nothing(arguments, flags, word, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in refusal(figures.main, arguments(*flags.split()))
    assert not (tmp_path / "out").exists()


def test_a_figure_takes_noises_of_one_size(arguments, noise_folder):
    torch.save(torch.randn(3, 8, 16), noise_folder / "03.pt")
    with pytest.raises(UserError, match="00 and others differ in size"):
        figures.main(arguments("--only", "eta"))

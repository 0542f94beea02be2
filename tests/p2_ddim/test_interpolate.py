"""Slerp against its closed form; strips, lengths and the walk."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError, run
from p2_ddim import figures, interpolate
from p2_ddim.interpolate import STRIP, between, lerp, slerp
from p2_ddim.noise import Noise
from p2_ddim.sample import ddim_options, noises_for, sampler_from

ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def gaussian(seed, dtype=torch.float32):
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_slerp_turns_at_constant_speed():
    """In the plane the answer is known: the unit vector at the angle alpha theta."""
    for theta in (1e-9, 1e-3, 1.0, 3.0, math.pi - 1e-3):
        a, b = (torch.tensor([math.cos(x), math.sin(x)], dtype=torch.float64) for x in (0, theta))
        for alpha in ALPHAS:
            expected = torch.tensor([math.cos(alpha * theta), math.sin(alpha * theta)], dtype=torch.float64)
            assert (slerp(a, b, alpha) - expected).abs().max() < 1e-12


def test_slerp_is_the_papers_formula_over_all_values_together():
    a, b = gaussian(1).numpy().astype(np.float64), gaussian(2).numpy().astype(np.float64)
    theta = np.arccos((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    for alpha in ALPHAS:
        expected = (np.sin((1 - alpha) * theta) * a + np.sin(alpha * theta) * b) / np.sin(theta)
        ours = slerp(torch.from_numpy(a), torch.from_numpy(b), alpha)
        assert np.abs(ours.numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("method", [slerp, lerp])
@pytest.mark.parametrize(
    "other", ["gaussian", "same", "parallel", "opposite", "opposite and longer", "nearly opposite"]
)
def test_ends_are_exact_and_the_way_is_finite(method, other):
    a = gaussian(1)
    ends = {
        "gaussian": gaussian(2),
        "same": a.clone(),
        "parallel": 2 * a,
        "opposite": -a,
        "opposite and longer": -3 * a,
        "nearly opposite": -a + 1e-7 * gaussian(2),
    }
    b = ends[other]
    assert torch.equal(method(a, b, 0.0), a)
    assert torch.equal(method(a, b, 1.0), b)
    way = torch.stack([method(a, b, k / 50) for k in range(51)])
    assert way.dtype == torch.float32
    assert way.isfinite().all()
    lengths = way.flatten(1).norm(dim=1)
    if method is slerp:  # never far inside the sphere, and without jumps
        assert lengths.min() > 0.95 * min(a.norm(), b.norm())
        assert (way[1:] - way[:-1]).flatten(1).norm(dim=1).max() < 0.1 * max(a.norm(), b.norm())


def test_between_opposite_noises_the_length_is_kept():
    a = gaussian(1)
    for alpha in ALPHAS:
        assert abs(slerp(a, -a, alpha).norm() / a.norm() - 1) < 1e-5


@pytest.mark.parametrize("method", [slerp, lerp])
def test_noise_of_zeros(method):
    a, zeros = gaussian(1), torch.zeros(3, 8, 8)
    assert torch.equal(method(a, zeros, 0.5), 0.5 * a)
    assert torch.equal(method(zeros, zeros, 0.5), zeros)


def test_lerp_is_a_line():
    a, b = gaussian(1), gaussian(2)
    assert torch.equal(lerp(a, b, 0.25), 0.75 * a + 0.25 * b)


def test_lerp_leaves_the_shell_and_slerp_stays_on_it():
    a, b = (torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    shell = math.sqrt(a.numel())
    assert abs(slerp(a, b, 0.5).norm() / shell - 1) < 0.02
    assert abs(lerp(a, b, 0.5).norm() / shell - math.sqrt(0.5)) < 0.02


def test_the_strip_has_eleven_points():
    assert pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]) == list(STRIP)
    path = between(Noise("00", gaussian(1)), Noise("01", gaussian(2)), "slerp")
    assert len({noise.name for noise in path}) == 11


def test_noises_of_two_sizes_have_no_way_between():
    with pytest.raises(UserError, match="00 and 01"):
        between(Noise("00", torch.zeros(3, 8, 8)), Noise("01", torch.zeros(3, 8, 16)), "lerp")


def flags(noise, out, weights, *rest):
    return [str(noise), str(out), str(weights), "--steps", "2", *rest]


def test_strips_and_lengths(noise_folder, tmp_path, face_weights):
    args = interpolate.parse_arguments(flags(noise_folder, tmp_path / "out", face_weights, "--between", "02", "00"))
    files = interpolate.main(args)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lengths.png",
        "strip_lerp.png",
        "strip_slerp.png",
    ]
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    slerp_strip, lerp_strip = (np.asarray(Image.open(tmp_path / "out" / f"strip_{m}.png")) for m in ("slerp", "lerp"))
    assert slerp_strip.shape == lerp_strip.shape
    assert slerp_strip.shape[1] > 11 * 128
    # Both strips start and end with the same faces, and differ between.
    same = (slerp_strip == lerp_strip)[60:].all(axis=(0, 2))
    assert same[:128].all()
    assert same[-128:].all()
    assert not same.all()


def test_lengths_are_there_for_machines(noise_folder, tmp_path, face_weights):
    file = tmp_path / "lengths.json"
    args = flags(noise_folder, tmp_path / "out", face_weights, "--between", "02", "00", "--json", str(file))
    interpolate.main(interpolate.parse_arguments(args))
    result = json.loads(file.read_text())
    a, b = (torch.load(noise_folder / f"{name}.pt", weights_only=True).double() for name in ("02", "00"))
    assert result["between"] == ["02", "00"]
    assert result["sqrt_d"] == pytest.approx(math.sqrt(a.numel()))
    assert result["alphas"] == pytest.approx([k / 10 for k in range(11)])
    straight = [float(((1 - alpha) * a + alpha * b).norm()) for alpha in result["alphas"]]
    assert result["lerp"] == pytest.approx(straight, rel=1e-5)
    assert [result["slerp"][k] for k in (0, -1)] == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-5)
    assert min(result["slerp"]) > max(result["lerp"][3:8])


def test_walk_returns_to_where_it_began(noise_folder, tmp_path, face_weights):
    args = flags(noise_folder, tmp_path / "out", face_weights, "--walk", "--frames", "3")
    (path,) = interpolate.main(interpolate.parse_arguments(args))
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (4 * 3, (128, 128), 0)


def test_the_walk_goes_along_slerp_through_all_and_back(monkeypatch):
    noises, seen = [Noise(f"{k:02d}", gaussian(k)) for k in range(3)], []

    class Sampler:
        def pictures(self, path, options, batch_size):
            seen.extend(noise.xt for noise in path)
            return torch.zeros(len(path), 3, 8, 8, dtype=torch.uint8)

    frames = interpolate.walk(Sampler(), noises, 2, None, None)
    (a, b, c), middle = (noise.xt for noise in noises), 0.5
    expected = [a, slerp(a, b, middle), b, slerp(b, c, middle), c, slerp(c, a, middle)]
    assert len(frames) == len(seen) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected))


def test_the_two_first_noises_unless_others_are_named(noise_folder, tmp_path, face_weights):
    for k, path in enumerate(sorted(noise_folder.iterdir())):
        path.rename(noise_folder / f"{'dcba'[k]}.pt")
    for rest, expected in (([], ["a", "b"]), (["--between", "d", "b"], ["d", "b"])):
        file = tmp_path / "lengths.json"
        args = flags(noise_folder, tmp_path / "out", face_weights, "--json", str(file), *rest)
        interpolate.main(interpolate.parse_arguments(args))
        assert json.loads(file.read_text())["between"] == expected


def test_the_grid_has_a_row_an_eta(noise_folder, tmp_path, face_weights):
    args = figures.parse_arguments(flags(noise_folder, tmp_path / "out", face_weights, "--seed", "5"))
    sampler, options = sampler_from(args), ddim_options(args)
    noises = noises_for(sampler, noise_folder)
    picture = figures.eta_grid(sampler, noises, options, None).permute(1, 2, 0)[-5 * 130 - 2 :, -4 * 130 - 2 :]
    for row, eta in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        faces = sampler.pictures(noises, replace(options, eta=eta))
        for column, face in enumerate(faces):
            top, left = 2 + 130 * row, 2 + 130 * column
            assert torch.equal(picture[top : top + 128 : 8, left : left + 128 : 8], face.permute(1, 2, 0))


def test_other_names_do_for_what_needs_none(noise_folder, tmp_path, face_weights):
    for path in list(noise_folder.iterdir()):
        path.rename(noise_folder / f"my{path.name}")
    given = flags(noise_folder, tmp_path / "out", face_weights, "--only", "faces", "walk", "--faces", "1")
    figures.main(figures.parse_arguments([*given, "--frames", "1"]))
    with pytest.raises(UserError, match="noise 00: not there"):
        figures.main(figures.parse_arguments(flags(noise_folder, tmp_path / "out", face_weights, "--only", "eta")))


def test_figures(noise_folder, tmp_path, face_weights):
    args = flags(noise_folder, tmp_path / "out", face_weights, "--faces", "12", "--frames", "1")
    files = figures.main(figures.parse_arguments(args))
    names = ["eta.png", "faces.png", "lengths.png", "strip_lerp.png", "strip_slerp.png", "walk.gif"]
    assert [path.name for path in files] == names
    assert all(path.is_file() for path in files)
    eta = np.asarray(Image.open(tmp_path / "out" / "eta.png"))
    assert eta.shape[0] > 5 * 128
    assert eta.shape[1] > 4 * 128
    faces = np.asarray(Image.open(tmp_path / "out" / "faces.png"))
    assert faces.shape == (2 * 18 + 2, 10 * 18 + 2, 3)


def test_some_figures(noise_folder, tmp_path, face_weights):
    args = flags(noise_folder, tmp_path / "out", face_weights, "--only", "faces", "--faces", "1")
    assert [path.name for path in figures.main(figures.parse_arguments(args))] == ["faces.png"]


@pytest.mark.parametrize(
    ("program", "rest", "word"),
    [
        (interpolate, ["--between", "00", "77"], "noise 77"),
        (interpolate, ["--frames", "0"], "--frames 0"),
        (interpolate, ["--walk", "--json", "lengths.json"], "leave --walk or --json out"),
        (figures, ["--faces", "0"], "--faces 0"),
        (figures, ["--eta", "-1"], "--eta -1"),
    ],
)
def test_a_mistake_gives_one_line_and_writes_nothing(program, rest, word, noise_folder, tmp_path, face_weights, capsys):
    with pytest.raises(SystemExit) as caught:
        run(program.main, program.parse_arguments(flags(noise_folder, tmp_path / "out", face_weights, *rest)))
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert word in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_noise_has_no_way(noise_folder, tmp_path, face_weights):
    for rest in ([], ["--walk"]):
        args = interpolate.parse_arguments(flags(noise_folder / "00.pt", tmp_path / "out", face_weights, *rest))
        with pytest.raises(UserError, match=r"00\.pt: holds one noise"):
            interpolate.main(args)


def test_a_figure_takes_noises_of_one_size(noise_folder, tmp_path, face_weights):
    torch.save(torch.randn(3, 8, 16), noise_folder / "03.pt")
    with pytest.raises(UserError, match="00 and 03: are 16x16 and 16x8"):
        figures.main(figures.parse_arguments(flags(noise_folder, tmp_path / "out", face_weights, "--only", "eta")))

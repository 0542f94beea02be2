"""The benchmarks run, and their peers do the work they are said to do."""

import torch

from benchmarks import p1
from benchmarks.peers import PlainContextUNet, plain_steps
from common.sampling import draw


def test_the_plain_peer_has_the_published_size_and_takes_its_steps():
    with torch.device("meta"):
        assert round(sum(p.numel() for p in PlainContextUNet().parameters()) / 1e6) == 26
    torch.manual_seed(0)
    small = PlainContextUNet(width=16).eval()
    start = torch.randn(2, 3, 28, 28)
    moved = plain_steps(small, start, torch.tensor([3, 19]), 2.0, 2)
    assert moved.shape == start.shape
    assert moved.isfinite().all()
    assert not torch.equal(moved, start)


def test_diffusers_draws_our_pictures_from_the_same_noise(tiny_digit_weights):
    """Same network, noise and number of steps: without clipping, the two samplers are one algorithm."""
    sampler = p1.DigitSampler(tiny_digit_weights, torch.device("cpu"), "fp32")
    digits = p1.wanted_digits(sampler.domains, "2025", [0, 1], 2)
    options = {"sampler": "dpm-solver++", "steps": 6, "eta": 0.0, "guidance_scale": 2.0, "guidance_interval": (0, 1000)}
    steps = sampler.steps(digits, 0, options) | {"clip_x0": False}
    ours = p1.to_uint8(draw(**steps).clamp(-1, 1)).int()
    theirs = p1.diffusers_images(sampler, digits, options, 0).int()
    assert (ours - theirs).abs().max() <= 1


def test_the_benchmark_reports_every_figure(tiny_digit_weights, tmp_path):
    flags = [
        "--weights",
        str(tiny_digit_weights),
        "--images",
        "2",
        "--repeats",
        "1",
        "--steps",
        "2",
        "--peer-steps",
        "1",
    ]
    args = p1.parse_arguments([*flags, "--training-batch", "4", "--json", str(tmp_path / "p1.json")])
    figures = p1.main(args)
    assert set(figures["diffusers_seconds"]) == {"ddpm", "dpm-solver++"}
    assert figures["plain_peer"]["seconds_scaled"] > figures["ours_seconds"] > 0
    assert 0 < figures["utilisation"]["share"] < 1
    assert figures["training"]["step_ratio"] > 0
    assert (tmp_path / "p1.json").exists()

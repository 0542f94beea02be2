"""The speed program: peers do the work they are said to do, and every figure is there."""

import json
from time import sleep

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers, speed
from common.images import to_uint8
from common.sampling import draw
from p1_ddpm.digits import wanted_digits
from p1_ddpm.model import ContextUNet
from p1_ddpm.sample import DigitOptions, DigitSampler
from p2_ddim.model import COURSE, FaceUNet, FaceUNetConfig
from p2_ddim.noise import random_noises
from p2_ddim.sampler import DDIMOptions, FaceSampler
from tests.programs import parse, run

SMALL = FaceUNetConfig(widths=(8, 16), blocks=1, attention=(False, True), embedding=16)


def test_works_take_turns_and_the_median_counts():
    order, naps = [], iter([0.3, 0.0, 0.1, 0.0, 0.2, 0.0, 0.5, 0.0])

    def work(name):
        order.append(name)
        sleep(next(naps))
        return len(order)

    seconds, results = speed.time_in_turn({name: lambda name=name: work(name) for name in "ab"}, repeats=3)
    assert order == [*"abababab"]
    assert results == {"a": 7, "b": 8}
    assert seconds["b"] < 0.1 < 0.2 <= seconds["a"] < 0.5


def test_the_plain_digits_have_a_network_of_the_published_size():
    """Pearce's for 28x28 colour images: 26.3 million parameters, 10.99 GFLOP a pass."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
        model, zero = ContextUNet(peers.PLAIN_NETWORK), torch.zeros(1, dtype=torch.long)
        model(torch.zeros(1, 3, 28, 28), zero, zero)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(26.3e6, rel=0.05)
    assert flops.get_total_flops() == pytest.approx(10.99e9, rel=0.05)


def test_diffusers_draws_our_digits(tiny_digit_weights):
    """Same network, noise and number of steps: without clipping, the two samplers are one algorithm."""
    sampler = DigitSampler(tiny_digit_weights, "cpu", "fp32")
    digits, options = wanted_digits(sampler.domains, "2025", [0, 1], 2), DigitOptions(steps=6, guidance_scale=2.0)
    denoise, xt = peers.digit_denoiser(sampler, digits, 2.0), sampler.noise(digits, options)
    ours = to_uint8(draw(denoise, sampler.schedule, xt, sampler.schedule.timesteps(6), "dpm-solver++").clamp(-1, 1))
    assert (ours.int() - peers.draw_digits(sampler, digits, options).int()).abs().max() <= 1


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_both_peers_draw_our_faces(prediction):
    torch.manual_seed(0)
    network, about = peers.StandIn(FaceUNet(SMALL)).eval(), COURSE | {"prediction": prediction, "image_size": 8}
    noises, options = random_noises(3, (3, 8, 8), seed=0), DDIMOptions(steps=8)
    sampler = FaceSampler(network, about, torch.device("cpu"))
    ours = sampler.pictures(noises, options).int()
    loop = torch.cat([peers.draw_plainly(network, about, noise.xt[None], 8) for noise in noises]).int()
    assert ours.float().std() > 20
    assert (ours - loop).abs().max() <= 1
    assert (ours - peers.draw_faces(sampler, noises, options).int()).abs().max() <= 1


def test_every_figure_is_there(tiny_digit_weights, face_weights, tmp_path):
    flags = ["--images", 2, "--steps", 2, "--batch-size", 4, "--precision", "fp32", "--repeats", 1]
    digits = run(speed, "p1", "--weights", tiny_digit_weights, *flags, "--json", tmp_path / "p1.json")
    assert json.loads((tmp_path / "p1.json").read_text()) == digits
    drawn = run(speed, "p2", "--weights", face_weights, *flags)
    assert max(difference["mean_square"] for difference in drawn["difference"].values()) < 0.1
    for figures in (digits, drawn):
        assert figures["times_ours"].keys() == {"ours", "diffusers", "plain"}
        assert 0 < figures["share_of_matrix_product"] < 1
        assert figures["peak_memory_gib"] > 0


@pytest.mark.parametrize("flags", [("--images", "0"), ("--loop-images", "11"), ("--size", "15")])
def test_a_mistake_gives_one_line(face_weights, flags, refusal):
    line = refusal(speed.main, parse(speed, "p2", "--weights", face_weights, *flags))
    assert line.startswith(" ".join(flags))

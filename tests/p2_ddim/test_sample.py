"""Sampling against diffusers' scheduler in the ground truth's conventions, and the files that a grader reads."""

import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torchvision.utils import save_image

from common.images import to_uint8
from common.sampling import ImageNoise
from common.schedule import NoiseSchedule
from p2_ddim import evaluate, sample
from p2_ddim.model import COURSE, FaceUNet
from p2_ddim.noise import Noise, random_noises
from p2_ddim.sampler import DDIMOptions, FaceSampler
from tests.programs import read
from tests.shell import ROOT, call


class StandIn(nn.Module):
    """A random network beside the exact denoiser of Gaussian data with deviation 1/2 (eps prediction, linear betas).

    A random network alone is no denoiser: every step would multiply rounding errors, until two correct samplers differ.
    """

    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, network.config
        self.alphas_cumprod = NoiseSchedule(**COURSE["schedule"]).alphas_cumprod

    def forward(self, xt, t):
        a = self.alphas_cumprod.to(xt)[t][:, None, None, None]
        return (1 - a).sqrt() / (a / 4 + 1 - a) * xt + 0.3 * self.network(xt, t)


@torch.no_grad()
def by_diffusers(network, noises, options):
    """The final image and the last predicted x0 under diffusers' scheduler."""
    theirs = DDIMScheduler(
        beta_schedule="linear", timestep_spacing=options.timestep_spacing, steps_offset=1,
        set_alpha_to_one=options.final_alpha == "one", clip_sample=options.clip_x0,
    )  # fmt: skip
    xt = torch.stack([noise.xt for noise in noises])
    if xt.dtype == torch.float64:  # diffusers keeps its table in fp32
        theirs.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0] if options.final_alpha == "first" else torch.ones(())
    theirs.set_timesteps(options.steps)
    fresh = ImageNoise([(options.seed, zlib.crc32(noise.name.encode())) for noise in noises])
    for t in theirs.timesteps:
        noise = fresh.draw(xt.shape[1:], dtype=xt.dtype) if options.eta else None
        step = theirs.step(network(xt, t.repeat(len(xt))), t, xt, eta=options.eta, variance_noise=noise)
        xt = step.prev_sample
    return xt, step.pred_original_sample


def largest_difference(network, noises, options):
    """The largest absolute difference of our last step from diffusers', in xt and in x0, under the course's facts."""
    *_, last = FaceSampler(network, COURSE, torch.device("cpu")).walk(noises, options)
    xt, x0 = by_diffusers(network, noises, options)
    assert last.xt.dtype == xt.dtype
    return max((last.xt - xt).abs().max(), (last.x0 - x0).abs().max())


OTHERS = DDIMOptions(40, timestep_spacing="trailing", clip_x0=False, final_alpha="one")


@pytest.mark.parametrize("options", [DDIMOptions(), OTHERS], ids=["ground truth", "other conventions"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_our_sampler_equals_diffusers(narrow_model, options, eta, dtype, tolerance):
    network = FaceUNet(narrow_model.config).to(dtype).eval()
    network.load_state_dict(narrow_model.state_dict())
    noises = [Noise(noise.name, noise.xt.to(dtype)) for noise in random_noises(2, (3, 16, 16), seed=1)]
    assert largest_difference(StandIn(network), noises, replace(options, eta=eta, seed=4)) < tolerance


def test_min_max_saving_is_torchvisions(tmp_path):
    scales = torch.logspace(-2, 2, 5)[:, None, None, None]
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * scales
    images[4] = 0.25  # constant
    for k, (image, ours) in enumerate(zip(images, to_uint8(images, "minmax"))):
        save_image(image, tmp_path / f"{k}.png", normalize=True)
        assert np.array_equal(read(tmp_path / f"{k}.png"), ours.permute(1, 2, 0))


def test_images_are_named_after_their_noises(noise_folder, draw_faces):
    (noise_folder / "._00.pt").write_bytes(b"left by macOS")
    (noise_folder / "readme.txt").write_text("no noise")
    drawn = draw_faces(noise_folder)
    assert sorted(drawn) == ["00.png", "01.png", "02.png", "03.png"]
    for pixels in drawn.values():
        assert pixels.shape == (16, 16, 3)
        assert (pixels.min(), pixels.max()) == (0, 255)


def test_images_do_not_depend_on_the_batch_or_on_other_noises(noise_folder, draw_faces):
    together = draw_faces(noise_folder, "--eta", "1")
    in_threes = draw_faces(noise_folder, "--eta", "1", "--batch-size", "3")
    alone = draw_faces(noise_folder / "02.pt", "--eta", "1")
    assert list(alone) == ["02.png"]
    for name, pixels in (in_threes | alone).items():
        assert np.abs(pixels - together[name]).max() <= 1


def test_an_automatic_batch_on_a_cpu_holds_one_image_of_the_courses(course_model):
    sampler = FaceSampler(course_model, COURSE, torch.device("cpu"))
    assert [sampler.pick_batch_size(side, side) for side in (512, 256, 64)] == [1, 1, 8]


def test_auto_precision_is_the_ground_truths_and_lower_ones_stay_near(noise_folder, draw_faces):
    auto, fp32, bf16 = (draw_faces(noise_folder, "--precision", name) for name in ("auto", "fp32", "bf16"))
    assert all(np.array_equal(auto[name], fp32[name]) for name in auto)
    assert 0 < max(np.square(bf16[name] - fp32[name]).mean() for name in fp32) < 1


def test_the_courses_weights_through_the_program(tmp_path, course_model, draw_faces):
    """A UNet.pt as students get it: a bare state dict of 427 entries."""
    torch.save(course_model.state_dict(), tmp_path / "UNet.pt")
    torch.save(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), tmp_path / "07.pt")
    drawn = draw_faces(tmp_path / "07.pt", "--steps", "1", weights=tmp_path / "UNet.pt")
    assert drawn["07.png"].shape == (32, 32, 3)


def test_the_graded_command_draws_the_ground_truth(tmp_path):
    """hw2_2.sh with the shipped weights on two of the ten noises."""
    for folder, kind in (("noise", "pt"), ("GT", "png")):
        (tmp_path / folder).mkdir()
        for name in ("02", "07"):
            (tmp_path / folder / f"{name}.{kind}").symlink_to(sample.EXAMPLES / folder / f"{name}.{kind}")
    command = ["bash", ROOT / "hw2_2.sh", tmp_path / "noise", tmp_path / "out", sample.WEIGHTS]
    result = call(*command, patience=600, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    errors = evaluate.squared_errors(tmp_path / "out", tmp_path / "GT")
    assert sorted(errors) == ["02.png", "07.png"]
    assert max(errors.values()) < 0.1


@pytest.mark.slow
def test_a_compiled_network_draws_the_same(noise_folder, draw_faces):
    plain, compiled = draw_faces(noise_folder), draw_faces(noise_folder, "--compile")
    assert all(np.abs(compiled[name] - plain[name]).max() <= 1 for name in plain)

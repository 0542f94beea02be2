"""Sampling against diffusers' scheduler in the ground truth's conventions, and the files that a grader reads."""

import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torchvision.utils import save_image

from benchmarks.p2 import StandIn
from common.images import to_uint8
from common.sampling import ImageNoise, reverse_process
from common.schedule import NoiseSchedule
from p2_ddim import evaluate, sample
from p2_ddim.model import COURSE, FaceUNet, FaceUNetConfig
from p2_ddim.noise import Noise
from p2_ddim.sampler import DDIMOptions, FaceSampler, images_that_fit
from tests.shell import ROOT, call


def last_step(network, noises, options):
    """The last step of our sampler around this network, under the course's facts."""
    sampler = FaceSampler(network, COURSE, torch.device("cpu"))
    return list(reverse_process(**sampler.steps(noises, options)))[-1]


def noises_of(count, size, dtype=torch.float32):
    drawn = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return [Noise(f"{k:02d}", xt) for k, xt in enumerate(drawn)]


@torch.no_grad()
def by_diffusers(network, noises, options):
    """The final image and the last predicted x0 under the contract's DDIMScheduler."""
    theirs = DDIMScheduler(
        beta_schedule="linear", timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=True
    )
    xt = torch.stack([noise.xt for noise in noises])
    if xt.dtype == torch.float64:  # diffusers keeps its table in fp32
        theirs.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    theirs.set_timesteps(options.steps)
    fresh = ImageNoise([(options.seed, zlib.crc32(noise.name.encode())) for noise in noises])
    for t in theirs.timesteps:
        noise = fresh.draw(xt.shape[1:], dtype=xt.dtype) if options.eta else None
        step = theirs.step(network(xt, t.repeat(len(xt))), t, xt, eta=options.eta, variance_noise=noise)
        xt = step.prev_sample
    return xt, step.pred_original_sample


def largest_difference(network, noises, options):
    """The largest absolute difference of our last step from diffusers', in xt and in x0."""
    ours = last_step(network, noises, options)
    xt, x0 = by_diffusers(network, noises, options)
    assert ours.xt.dtype == xt.dtype
    return max((ours.xt - xt).abs().max(), (ours.x0 - x0).abs().max())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_fifty_steps_equal_diffusers(narrow_model, eta, dtype, tolerance):
    network = FaceUNet(narrow_model.config).to(dtype).eval()
    network.load_state_dict(narrow_model.state_dict())
    assert largest_difference(StandIn(network), noises_of(2, 16, dtype), DDIMOptions(eta=eta, seed=4)) < tolerance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_courses_network_equals_diffusers(course_model, eta):
    assert largest_difference(StandIn(course_model), noises_of(1, 32), DDIMOptions(2, eta)) < 1e-4


@pytest.mark.parametrize(
    "other",
    [{"clip_x0": False}, {"final_alpha": "one"}, {"timestep_spacing": "trailing"}, {"eta": 0.6}, {"seed": 5}],
    ids=str,
)
def test_every_named_option_changes_the_image(narrow_model, other):
    network, noises, options = StandIn(narrow_model), noises_of(1, 16), DDIMOptions(10, eta=0.5)
    standard = last_step(network, noises, options).xt
    assert (last_step(network, noises, replace(options, **other)).xt - standard).abs().max() > 1e-3


def test_the_ground_truths_timesteps():
    assert DDIMOptions().timesteps(NoiseSchedule()) == list(range(981, 0, -20))


def test_min_max_saving_is_torchvisions(tmp_path):
    images = (
        torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        * torch.logspace(-2, 2, 5)[:, None, None, None]
    )
    images[4] = 0.25  # constant
    for k, (image, ours) in enumerate(zip(images, to_uint8(images, "minmax"))):
        save_image(image, tmp_path / f"{k}.png", normalize=True)
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{k}.png")), ours.permute(1, 2, 0).numpy())


def test_images_are_named_after_their_noises(noise_folder, tmp_path, face_weights, draw_faces):
    (noise_folder / "._00.pt").write_bytes(b"left by macOS")
    (noise_folder / "readme.txt").write_text("no noise")
    drawn = draw_faces(noise_folder, tmp_path / "new" / "out", face_weights)
    assert sorted(drawn) == ["00.png", "01.png", "02.png", "03.png"]
    for pixels in drawn.values():
        assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
        assert (pixels.min(), pixels.max()) == (0, 255)


def test_images_do_not_depend_on_the_batch_or_on_other_noises(noise_folder, tmp_path, face_weights, draw_faces):
    together = draw_faces(noise_folder, tmp_path / "a", face_weights, "--eta", "1")
    in_threes = draw_faces(noise_folder, tmp_path / "b", face_weights, "--eta", "1", "--batch-size", "3")
    alone = draw_faces(noise_folder / "02.pt", tmp_path / "c", face_weights, "--eta", "1")
    assert list(alone) == ["02.png"]
    for name, pixels in (in_threes | alone).items():
        assert np.abs(pixels.astype(int) - together[name]).max() <= 1


def test_lower_precision_stays_near(noise_folder, tmp_path, face_weights, draw_faces):
    exact = draw_faces(noise_folder, tmp_path / "a", face_weights)
    near = draw_faces(noise_folder, tmp_path / "b", face_weights, "--precision", "bf16")
    errors = [np.square(near[name].astype(float) - exact[name]).mean() for name in exact]
    assert 0 < max(errors) < 1


def test_auto_precision_is_the_ground_truths(noise_folder, tmp_path, face_weights, draw_faces):
    auto = draw_faces(noise_folder, tmp_path / "a", face_weights)
    fp32 = draw_faces(noise_folder, tmp_path / "b", face_weights, "--precision", "fp32")
    assert all(np.array_equal(auto[name], fp32[name]) for name in auto)


def test_ten_images_of_the_course_fit_eight_gigabytes():
    """Beside the weights and the libraries, which take less than two."""
    course = FaceUNetConfig(), 256, 256
    assert images_that_fit(*course, number_bytes=4, memory=6 * 10**9) >= 10
    assert images_that_fit(*course, number_bytes=2, memory=6 * 10**9) >= 20
    assert images_that_fit(*course, number_bytes=4, memory=1) == 1


def test_the_courses_weights_and_noises_through_the_program(tmp_path, course_model, noise_folder, draw_faces):
    """A UNet.pt as students get it: a bare state dict of 427 entries."""
    torch.save(course_model.state_dict(), tmp_path / "UNet.pt")
    torch.save(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), tmp_path / "07.pt")
    drawn = draw_faces(tmp_path / "07.pt", tmp_path / "out", tmp_path / "UNet.pt", "--steps", "1")
    assert drawn["07.png"].shape == (32, 32, 3)


def test_the_shipped_weights_draw_the_shipped_ground_truth(tmp_path, capsys):
    """Two of the ten; `test_the_graded_command` has all."""
    noise, truth = tmp_path / "noise", tmp_path / "GT"
    for folder, kind in ((noise, "pt"), (truth, "png")):
        folder.mkdir()
        for name in ("02", "07"):
            (folder / f"{name}.{kind}").symlink_to(sample.EXAMPLES / folder.name / f"{name}.{kind}")
    sample.main(sample.parse_arguments([str(noise), str(tmp_path / "out")]))
    errors = evaluate.main(evaluate.parse_arguments([str(tmp_path / "out"), str(truth)]))
    assert sorted(errors) == ["02.png", "07.png", "mean"]
    assert max(errors.values()) < 0.1


@pytest.mark.slow
def test_the_graded_command(tmp_path):
    """hw2_2.sh with the interpreter that runs this, and evaluate.py on what it wrote."""
    out = tmp_path / "out"
    command = ["bash", ROOT / "hw2_2.sh", sample.EXAMPLES / "noise", out, sample.WEIGHTS]
    result = call(*command, patience=600, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    result = call(sys.executable, ROOT / "p2_ddim" / "evaluate.py", out, sample.EXAMPLES / "GT")
    mean = float(result.stdout.split()[-1])
    assert mean < 0.1


@pytest.mark.slow
def test_a_compiled_network_draws_the_same(noise_folder, tmp_path, face_weights, draw_faces):
    plain = draw_faces(noise_folder, tmp_path / "a", face_weights)
    compiled = draw_faces(noise_folder, tmp_path / "b", face_weights, "--compile")
    assert all(np.abs(compiled[name].astype(int) - plain[name]).max() <= 1 for name in plain)

"""Reverse steps and loops against diffusers' schedulers; guidance against its formula."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from common.cli import UserError
from common.sampling import Denoiser, ImageNoise, Step, check_finite, draw, draw_in_batches
from common.schedule import NoiseSchedule

SHAPE = (2, 3, 8, 8)
DIFFUSERS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def start(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def network(xt, t):
    """A smooth stand-in whose output depends on every input; t is a number or (N,)."""
    return torch.tanh(1.3 * xt + xt.mean() + torch.as_tensor(t, dtype=xt.dtype).reshape(-1, 1, 1, 1) / 700)


class RecordedNoise:
    """The same noise for us and for diffusers, in the order of drawing."""

    def __init__(self, steps):
        generator = torch.Generator().manual_seed(5)
        self.noises = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps)]

    def draw(self, shape, device, dtype):
        return self.noises.pop(0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("final_alpha", ["one", "first"])
@pytest.mark.parametrize(("clip", "derive"), [(True, False), (True, True), (False, False)])
def test_ddim_equals_diffusers(eta, final_alpha, clip, derive):
    theirs = DDIMScheduler(
        beta_schedule="linear", timestep_spacing="leading", steps_offset=1,
        set_alpha_to_one=final_alpha == "one", clip_sample=clip,
    )  # fmt: skip
    theirs.alphas_cumprod = NoiseSchedule("linear").alphas_cumprod
    theirs.final_alpha_cumprod = torch.tensor(1.0) if final_alpha == "one" else theirs.alphas_cumprod[0]
    theirs.set_timesteps(20)
    schedule = NoiseSchedule("linear")
    timesteps = schedule.timesteps(20, "leading", 1)
    noises = RecordedNoise(20).noises
    xt = start()
    for t, noise in zip(theirs.timesteps, noises):
        step = theirs.step(network(xt, int(t)), t, xt, eta=eta, variance_noise=noise, use_clipped_model_output=derive)
        xt = step.prev_sample
    denoise = Denoiser(network, schedule, "eps", clip_x0=clip, use_clipped_model_output=derive)
    ours = draw(denoise, schedule, start(), timesteps, eta=eta, noise=RecordedNoise(20), final_alpha=final_alpha)
    assert (ours - xt).abs().max() < 1e-9


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_sampling_equals_diffusers(prediction, clip, monkeypatch):
    theirs = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=DIFFUSERS_NAMES[prediction], clip_sample=clip
    )
    schedule = NoiseSchedule("cosine")
    theirs.alphas_cumprod = schedule.alphas_cumprod
    theirs.set_timesteps(1000)
    noise = RecordedNoise(999)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: noise.draw(shape, None, None)
    )
    xt = start()
    for t in theirs.timesteps:
        xt = theirs.step(network(xt, int(t)), t, xt).prev_sample
    denoise = Denoiser(network, schedule, prediction, clip_x0=clip, use_clipped_model_output=True)
    ours = draw(denoise, schedule, start(), range(999, -1, -1), method="ddpm", noise=RecordedNoise(999))
    # Without clipping the stand-in network lets eps prediction grow to thousands, so the bound is relative.
    assert (ours - xt).abs().max() < 1e-10 * xt.abs().max().clamp(min=1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_dpm_solver_equals_diffusers(prediction, steps):
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=DIFFUSERS_NAMES[prediction], algorithm_type="dpmsolver++",
        solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule("cosine")
    timesteps = schedule.timesteps(steps, "trailing")
    assert theirs.timesteps.tolist() == timesteps
    # diffusers keeps its sigmas in float32; give it ours, sigma = sqrt((1 - a) / a), so that the formulas are compared
    alpha_bars = schedule.alphas_cumprod[timesteps]
    theirs.sigmas = torch.cat([((1 - alpha_bars) / alpha_bars).sqrt(), torch.zeros(1, dtype=torch.float64)])
    xt = start()
    for t in theirs.timesteps:
        xt = theirs.step(network(xt, int(t)), t, xt).prev_sample
    denoise = Denoiser(network, schedule, prediction, clip_x0=False)
    ours = draw(denoise, schedule, start(), timesteps, method="dpm-solver++")
    # diffusers computes some of its coefficients in float32
    assert (ours - xt).abs().max() < 1e-6 * xt.abs().max().clamp(min=1)


def test_guidance_is_one_batched_call_and_none_at_scale_one():
    sizes = []

    def labelled(xt, t, labels):
        sizes.append(len(xt))
        return xt * labels.reshape(-1, 1, 1, 1)

    condition, null = {"labels": torch.tensor([2.0, 3.0])}, {"labels": torch.tensor([1.0, 1.0])}
    xt, schedule = start(), NoiseSchedule()

    def predict(scale, t=10, **options):
        return Denoiser(labelled, schedule, "x0", condition, null, scale, clip_x0=False, **options)(xt, t)[0]

    scales = torch.tensor([1 + 3 * (2 - 1), 1 + 3 * (3 - 1)], dtype=torch.float64).reshape(-1, 1, 1, 1)
    assert (predict(3.0) - xt * scales).abs().max() < 1e-12
    assert torch.equal(predict(1.0), xt * condition["labels"].reshape(-1, 1, 1, 1))
    for t in (99, 100, 200, 201):
        predict(3.0, t, guidance_interval=(100, 200))
    assert sizes == [4, 2, 2, 4, 4, 2]


def test_no_gradient_is_kept():
    weight = torch.nn.Parameter(torch.ones(()))
    x0, eps = Denoiser(lambda xt, t: xt * weight, NoiseSchedule(), "v")(start(), 10)
    assert not x0.requires_grad
    assert not eps.requires_grad


class TestBatches:
    """Ten numbers, each drawn as an image of that value, by a machine with room for so many at a time."""

    def draw(self, room=10, batch_size=4, broken=(), to_fp32=None):
        self.sizes = []

        def walk(batch):
            self.sizes.append(len(batch))
            if len(batch) > room:
                raise torch.OutOfMemoryError
            for t in (1, 0):
                xt = torch.tensor([float(k) for k in batch]).reshape(-1, 1, 1, 1)
                yield Step(t, xt, xt)

        def finish(batch, xt):
            check_finite(torch.where(torch.isin(xt, torch.tensor(broken)), torch.nan, xt), batch, "fp16")
            return xt + 100

        return list(draw_in_batches(range(10), walk, finish, batch_size=batch_size, steps=2, to_fp32=to_fp32))

    def test_a_batch_that_does_not_fit_is_halved(self, capsys):
        assert [item for item, _ in self.draw(room=3, batch_size=8)] == list(range(10))
        assert self.sizes == [8, 4, 2, 2, 2, 2, 2]
        assert capsys.readouterr().err.splitlines() == [
            f"warning: the GPU's memory is full; going on with --batch-size {size}" for size in (4, 2)
        ]

    def test_an_image_that_does_not_fit_is_a_line(self):
        with pytest.raises(UserError, match="one image does not fit the GPU's memory; choose --precision"):
            self.draw(room=0)

    def test_what_overflows_is_drawn_again_in_fp32(self, capsys):
        broken, calls = [5.0], []

        def to_fp32():
            calls.append(broken.pop())
            return True

        drawn = self.draw(broken=broken, to_fp32=to_fp32)
        assert [float(image) for _, image in drawn] == [100.0 + k for k in range(10)]
        assert self.sizes == [4, 4, 4, 2]
        assert "half precision overflows" in capsys.readouterr().err


def test_noise_belongs_to_the_image():
    keys = [(7, 0, k) for k in range(5)]
    together = ImageNoise(keys)
    first, second = together.draw((3, 4, 4)), together.draw((3, 4, 4))
    for k in (3, 0):
        alone = ImageNoise([keys[k]])
        assert all(torch.equal(alone.draw((3, 4, 4))[0], noise[k]) for noise in (first, second))
    assert len({tuple(image.flatten().tolist()) for image in first}) == 5


def test_a_lack_of_noise_and_unknown_methods_are_refused():
    for options, complaint in (({"eta": 0.5}, "noise"), ({"method": "euler"}, "euler")):
        with pytest.raises(ValueError, match=complaint):
            draw(Denoiser(network, NoiseSchedule(), "eps"), NoiseSchedule(), start(), [10, 5], **options)

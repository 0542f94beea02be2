"""What comes with the project: noises, ground truth by diffusers' scheduler, weights that can be checked."""

import numpy as np
import pytest
import torch

from p2_ddim import evaluate, make_examples, sample
from p2_ddim.make_examples import diffusers_scheduler
from p2_ddim.model import COURSE
from p2_ddim.noise import random_noises
from tests.programs import run


@pytest.fixture(scope="module")
def examples(tmp_path_factory, face_weights):
    folder = tmp_path_factory.mktemp("project")
    run(make_examples, "--weights", face_weights, "--out", folder)
    return folder


def test_our_sampler_reproduces_the_ground_truth(examples, face_weights, tmp_path):
    """Fifty steps through both programs, from the files that were written."""
    run(sample, examples / "noise", tmp_path, face_weights)
    errors = evaluate.squared_errors(tmp_path, examples / "GT")
    assert len(errors) == 10
    assert sum(errors.values()) < 0.1


def test_noises_are_the_seeds_and_are_kept(tmp_path):
    own = torch.zeros(1, 3, 16, 16)
    (tmp_path / "noise").mkdir()
    torch.save(own, tmp_path / "noise" / "04.pt")
    make_examples.write_noises(tmp_path / "noise", 3, 16, seed=0)
    files = sorted((tmp_path / "noise").iterdir())
    assert [path.name for path in files] == [f"{k:02d}.pt" for k in range(10)]
    # A number's noise does not depend on how many are drawn.
    for path, noise in zip(files, random_noises(12, (3, 16, 16), 0)):
        tensor = torch.load(path, weights_only=True)
        assert (tensor.shape, tensor.dtype) == ((1, 3, 16, 16), torch.float32)
        assert torch.equal(tensor, own if path.stem == "04" else noise.xt[None])
        assert path.stat().st_size < 8000  # not the storage of all ten


def test_for_the_courses_weights_the_scheduler_is_the_contracts():
    scheduler = diffusers_scheduler(COURSE)
    expected = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    assert np.abs(scheduler.alphas_cumprod.numpy() - expected).max() < 1e-6
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert scheduler.config.prediction_type == "epsilon"

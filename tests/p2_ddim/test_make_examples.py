"""What comes with the project: noises, ground truth by diffusers' scheduler, weights that can be checked."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors
from common.cli import UserError
from p2_ddim import evaluate, make_examples, sample
from p2_ddim.make_examples import diffusers_scheduler
from p2_ddim.model import COURSE
from p2_ddim.noise import random_noises


@pytest.fixture(scope="module")
def examples(tmp_path_factory, face_weights):
    folder = tmp_path_factory.mktemp("project")
    args = ["--install", str(face_weights), "--weights", str(folder / "weights" / "faces.safetensors")]
    make_examples.main(make_examples.parse_arguments([*args, "--out", str(folder / "examples")]))
    return folder


def test_our_sampler_reproduces_the_ground_truth(examples, tmp_path, draw_faces):
    """Fifty steps through both programs, from the files that were written."""
    sources = examples / "examples" / "noise", examples / "weights" / "faces.safetensors"

    def errors(name, *flags):
        draw_faces(sources[0], tmp_path / name, sources[1], "--steps", "50", *flags)
        args = evaluate.parse_arguments([str(tmp_path / name), str(examples / "examples" / "GT")])
        return evaluate.main(args)

    ours = errors("ours")
    assert len(ours) == 11
    assert ours["mean"] < 0.01
    assert errors("other conventions", "--final-alpha", "one", "--save-range", "clamp")["mean"] > 0.1


def test_noises_are_the_seeds_and_are_kept(examples, tmp_path):
    folder = examples / "examples" / "noise"
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"{k:02d}.pt" for k in range(10)]
    for path, noise in zip(files, random_noises(10, (3, 16, 16), 0)):
        tensor = torch.load(path, weights_only=True)
        assert (tensor.shape, tensor.dtype) == ((1, 3, 16, 16), torch.float32)
        assert torch.equal(tensor[0], noise.xt)
        assert path.stat().st_size < 8000  # not the storage of all ten
    own = torch.zeros(1, 3, 16, 16)
    torch.save(own, tmp_path / "04.pt")
    make_examples.write_noises(tmp_path, random_noises(10, (3, 16, 16), 0))
    assert len(list(tmp_path.iterdir())) == 10
    assert torch.equal(torch.load(tmp_path / "04.pt", weights_only=True), own)


def test_installed_weights_are_halved_and_summed(examples, face_weights):
    path = examples / "weights" / "faces.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (path.parent / "SHA256SUMS").read_text() == f"{digest}  faces.safetensors\n"
    (halved, facts), (full, about) = load_tensors(path), load_tensors(face_weights)
    assert facts == about
    assert all(torch.equal(tensor, full[name].half()) for name, tensor in halved.items())


def test_noises_of_no_size(tmp_path):
    with pytest.raises(UserError, match="--noise-only 0: sizes start at 1"):
        make_examples.main(make_examples.parse_arguments(["--noise-only", "0", "--out", str(tmp_path)]))


def test_a_number_does_not_depend_on_how_many_are_drawn():
    few, many = random_noises(3, (3, 8, 8), 5), random_noises(12, (3, 8, 8), 5)
    assert [noise.name for noise in many[:3]] == [noise.name for noise in few]
    assert all(torch.equal(a.xt, b.xt) for a, b in zip(few, many))
    assert not torch.equal(many[0].xt, random_noises(1, (3, 8, 8), 6)[0].xt)


def test_for_the_courses_weights_the_scheduler_is_the_contracts():
    scheduler = diffusers_scheduler(COURSE)
    expected = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    assert np.abs(scheduler.alphas_cumprod.numpy() - expected).max() < 1e-6
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert scheduler.config.prediction_type == "epsilon"


def test_the_noises_that_come_with_the_project():
    """Standard normal, 64x64, as the course saves them."""
    files = sorted((sample.EXAMPLES / "noise").iterdir())
    assert [path.name for path in files] == [f"{k:02d}.pt" for k in range(10)]
    noises = torch.cat([torch.load(path, weights_only=True) for path in files])
    assert (noises.shape, noises.dtype) == ((10, 3, 64, 64), torch.float32)
    assert noises.mean().abs() < 0.02
    assert (noises.flatten(1).std(dim=1) - 1).abs().max() < 0.03


def test_the_image_file_is_the_one_diffusers_drew(examples):
    with Image.open(examples / "examples" / "GT" / "03.png") as image:
        assert (image.size, image.mode, image.format) == ((16, 16), "RGB", "PNG")

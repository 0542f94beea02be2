"""What many tests share: one thread, a fresh accelerate in every test, tiny weights of digits and faces."""

import contextlib
import resource
import sys
from dataclasses import asdict

import pytest
import torch

from common.checkpoint import save_tensors
from common.cli import run, silence
from common.schedule import NoiseSchedule
from p1_ddpm.digits import DOMAINS
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from p2_ddim.model import FaceUNet, FaceUNetConfig

pytest_plugins = ["tests.stable_diffusion"]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from threads, and several tests may share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Forget accelerate's process-wide state, which would hand one test's precision to the next."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def save_random(path, kind, config, std, **facts):
    """Write a network that predicts v, with all weights drawn anew, those that begin as zeros too."""
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    about = {"kind": kind.__name__, "config": asdict(config), "schedule": asdict(NoiseSchedule("cosine"))}
    save_tensors(path, model.state_dict(), about | {"prediction": "v"} | facts)
    return path


@pytest.fixture(scope="session")
def tiny_digit_weights(tmp_path_factory):
    """A small Context-UNet of all twenty classes, where labels and time matter."""
    path, config = tmp_path_factory.mktemp("weights"), ContextUNetConfig(widths=(16, 32), embedding=32)
    return save_random(path / "tiny.safetensors", ContextUNet, config, 0.15, domains=DOMAINS, image_size=28)


@pytest.fixture(scope="session")
def face_weights(tmp_path_factory):
    """A small face network for 16x16 images, which draws what is neither noise nor a face."""
    config = FaceUNetConfig(patch_size=2, widths=(8, 16), blocks=1, attention=(False, True), embedding=16)
    return save_random(tmp_path_factory.mktemp("weights") / "faces.safetensors", FaceUNet, config, 0.3, image_size=16)


@pytest.fixture
def refusal(capsys):
    """A function that runs a program which must refuse its arguments: the one line on stderr, without "error: "."""

    def refused(main, args) -> str:
        capsys.readouterr()
        # Silent, because on a busy machine progress would print a line of its own.
        with silence(), pytest.raises(SystemExit) as caught:
            run(main, args)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error.removeprefix("error: ").rstrip("\n")

    return refused


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond so many bytes: writing fails as on a full disk."""

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited

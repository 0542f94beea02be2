"""What the grader gets: names, sizes, the same pixels whatever the batch, and a line for everything that is wrong."""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors, save_tensors
from common.images import to_uint8
from common.runtime import seeded_generator
from common.schedule import NoiseSchedule
from p1_ddpm import sample
from p1_ddpm.digits import Digit
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from tests.programs import parse, read, run
from tests.shell import ROOT, call


@pytest.fixture
def weights(tiny_digit_weights):
    return tiny_digit_weights


def changed(weights, path, state=None, **facts) -> Path:
    """A copy of the weights with another state or other facts."""
    tensors, about = load_tensors(weights)
    save_tensors(path, tensors if state is None else state, about | facts)
    return path


def draw(out, weights, *flags) -> dict[str, np.ndarray]:
    files = run(sample, out, "--weights", weights, "--steps", 3, *flags)
    return {str(path.relative_to(out)): read(path) for path in files}


@pytest.mark.parametrize(
    ("layout", "digits"),
    [("2025", {"mnistm": "02468", "svhn": "13579"}), ("2024", {"mnistm": "0123456789", "svhn": "0123456789"})],
)
def test_layouts_of_the_course(tmp_path, weights, layout, digits):
    draw(tmp_path, weights, "--layout", layout, "--guidance-scale", "1", "--steps", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mnistm", "svhn"]
    for domain, held in digits.items():
        expected = sorted(f"{digit}_{number:03d}.png" for digit in held for number in range(1, 51))
        assert sorted(path.name for path in (tmp_path / domain).iterdir()) == expected
    with Image.open(tmp_path / "svhn" / "1_050.png") as image:
        assert (image.size, image.mode, image.format) == ((28, 28), "RGB", "PNG")


@pytest.mark.parametrize("sampler", [["dpm-solver++"], ["ddpm"], ["ddim", "--eta", "0.5"]])
def test_pixels_depend_only_on_seed_class_and_number(tmp_path, weights, sampler):
    flags = ["--sampler", *sampler, "--precision", "fp32"]
    one = draw(tmp_path / "a", weights, *flags, "--count", "3", "--batch-size", "1")
    seven = draw(tmp_path / "b", weights, *flags, "--count", "3", "--batch-size", "7")
    many = draw(tmp_path / "c", weights, *flags, "--count", "4", "--batch-size", "500", "--layout", "2024")
    assert len(one) == 30
    for name, pixels in one.items():
        assert np.array_equal(pixels, seven[name]), name
        assert np.array_equal(pixels, many[name]), name
    other = draw(tmp_path / "d", weights, *flags, "--count", "3", "--seed", "1")
    assert all(not np.array_equal(pixels, other[name]) for name, pixels in one.items())


def test_bf16_pixels_stay_within_one_level(tmp_path, weights):
    flags = ["--precision", "bf16", "--count", "2", "--batch-size"]
    one, seven, many = (draw(tmp_path / size, weights, *flags, size) for size in ("1", "7", "500"))
    for name, pixels in one.items():
        assert np.abs(pixels - np.stack([seven[name], many[name]])).max() <= 1


def test_guidance_changes_the_picture_and_classes_choose_digits(tmp_path, weights):
    def drawn(name, *flags):
        return draw(tmp_path / name, weights, "--classes", "3", "4", "--count", "2", "--guidance-scale", *flags)

    plain, strong, off = drawn("a", "1"), drawn("b", "4"), drawn("c", "4", "--guidance-interval", "1000", "1000")
    assert sorted(plain) == ["mnistm/4_001.png", "mnistm/4_002.png", "svhn/3_001.png", "svhn/3_002.png"]
    assert all(not np.array_equal(pixels, strong[name]) for name, pixels in plain.items())
    assert all(np.array_equal(pixels, off[name]) for name, pixels in plain.items())


def test_weights_of_other_images_draw_their_own_classes(tmp_path, weights):
    config = ContextUNetConfig(num_labels=3, widths=(16, 32), embedding=32)
    facts = {"config": asdict(config), "domains": {"flowers": 3}, "image_size": 32}
    flowers = changed(weights, tmp_path / "flowers.safetensors", ContextUNet(config).state_dict(), **facts)
    drawn = draw(tmp_path / "out", flowers, "--count", "1")
    assert sorted(drawn) == [f"flowers/{label}_001.png" for label in range(3)]
    assert drawn["flowers/0_001.png"].shape == (32, 32, 3)


def test_two_processes_draw_what_one_draws(tmp_path, weights):
    alone = draw(tmp_path / "one", weights, "--count", "3", "--precision", "fp32")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    flags = ["--weights", str(weights), "--steps", "3", "--count", "3", "--precision", "fp32"]
    script = [ROOT / "p1_ddpm" / "sample.py", tmp_path / "two", *flags]
    result = call(*launch, *script, patience=240, OMP_NUM_THREADS=1)
    assert result.returncode == 0, result.stderr
    # Some versions of torch report gloo's connections on stdout.
    told = [line for line in result.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert told == [f"30 images in {tmp_path / 'two'}, drawn by 2 processes"]
    files = sorted((tmp_path / "two").rglob("*.png"))
    assert len(files) == len(alone) == 30
    for path in files:
        assert np.array_equal(read(path), alone[str(path.relative_to(tmp_path / "two"))])


@pytest.fixture
def complaint(refusal):
    """A function that draws as `draw` does, but must be refused; returns the line on stderr."""

    def refused(out, weights, *flags) -> str:
        return refusal(sample.main, parse(sample, out, "--weights", weights, "--steps", 3, *flags))

    return refused


def test_files_that_a_grader_would_misread_stop_the_run(tmp_path, weights, complaint):
    (tmp_path / "mnistm").mkdir()
    (tmp_path / "mnistm" / ".DS_Store").write_text("stray")
    (tmp_path / "mnistm" / "1_001.png").write_text("an odd digit of the other layout")
    line = complaint(tmp_path, weights, "--count", "1")
    assert "2 other files" in line
    assert "--overwrite" in line
    (folder := tmp_path / "svhn" / "notes").mkdir(parents=True)
    assert "notes: is a folder" in complaint(tmp_path, weights, "--count", "1", "--overwrite")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".DS_Store", "1_001.png", "mnistm", "notes", "svhn"]
    folder.rmdir()
    draw(tmp_path, weights, "--count", "1", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "mnistm").iterdir()) == [f"{d}_001.png" for d in (0, 2, 4, 6, 8)]
    draw(tmp_path, weights, "--count", "1")  # the same names again are no strays


def test_nothing_is_written_before_the_weights_are_known_to_be_good(tmp_path, weights, complaint):
    state, _ = load_tensors(weights)
    del state["head.2.bias"]
    misfit = changed(weights, tmp_path / "misfit.safetensors", state)
    assert "1 missing (head.2.bias)" in complaint(tmp_path / "out", misfit)
    assert not (tmp_path / "out").exists()


BAD = "--steps 0, --count 0, --batch-size 0, --classes 10, --seed -1, --guidance-scale -1, --guidance-scale nan"


@pytest.mark.parametrize("flags", [*BAD.split(", "), "--sampler ddim --eta 2"])
def test_values_out_of_range(tmp_path, weights, complaint, flags):
    assert flags.removeprefix("--sampler ddim ") in complaint(tmp_path / "out", weights, *flags.split())
    assert not (tmp_path / "out").exists()


def test_digits_that_are_not_finite_are_not_saved(tmp_path, weights, complaint):
    state = {name: tensor * torch.nan for name, tensor in load_tensors(weights)[0].items()}
    said = complaint(tmp_path / "out", changed(weights, tmp_path / "broken.safetensors", state), "--precision", "fp32")
    assert said == "mnistm/0_001.png: drawn in fp32 it is not finite; name other weights"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_more_steps_than_the_weights_schedule_has(tmp_path, weights, complaint):
    short = changed(weights, tmp_path / "short.safetensors", schedule=asdict(NoiseSchedule("cosine", T=20)))
    assert complaint(tmp_path / "out", short, "--steps", "21") == "--steps 21: must be from 1 to 20"
    assert not (tmp_path / "out").exists()
    assert len(draw(tmp_path / "out", short, "--steps", "20", "--count", "1")) == 10


def test_a_sampler_needs_no_script_around_it_and_its_walk_ends_in_its_images(weights):
    sampler, options = sample.DigitSampler(weights, precision="fp32"), sample.DigitOptions(steps=3)
    digits = [Digit("svhn", 7, 1), Digit("mnistm", 0, 2)]
    images = dict(sampler.images(digits, options))
    steps = list(sampler.walk(digits, options))
    assert [step.t for step in steps] == [999, 666, 332]
    assert torch.equal(torch.stack([images[digit] for digit in digits]), to_uint8(steps[-1].xt))
    first_noise = [torch.randn(3, 28, 28, generator=seeded_generator(0, *key)) for key in ((17, 1), (0, 2))]
    assert torch.equal(sampler.noise(digits, options), torch.stack(first_noise))


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm-solver++"])
def test_a_sampling_step_runs_on_the_meta_device(weights, method):
    sampler = sample.DigitSampler(weights, "cpu", "fp32")
    sampler.device = next(sampler.model.to("meta").parameters()).device
    options = sample.DigitOptions(sampler=method, steps=2, eta=0.5)
    *_, last = sampler.walk([Digit("mnistm", 2, 1), Digit("svhn", 1, 1)], options)
    assert last.xt.device.type == "meta"
    assert last.xt.shape == (2, 3, 28, 28)

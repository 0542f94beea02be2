"""Training on a folder of images: what a batch holds, what is held out, one run from start to resume."""

import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors
from common.data import read_folder_images, to_unit_range
from common.runtime import seeded_generator
from p2_ddim import train
from p2_ddim.train import draw_batch
from tests.programs import parse
from tests.training import metrics

SMALL = "--patch-size 2 --widths 8 16 --attention 0 1 --image-size 16 --batch-size 4 --precision fp32"
OFTEN = "--steps 4 --save-every 2 --validate-every 2 --sample-every 4 --log-every 1"


@pytest.fixture
def arguments(face_folder, tmp_path):
    paths = "--data", face_folder, "--out", tmp_path / "run"
    return lambda *flags: parse(train, *paths, *SMALL.split(), *OFTEN.split(), *flags)


def value(picture):
    """Which of the fixture's pictures this is, read from its dark half, mirrored or not."""
    return round(float(((picture.min() + 1) * 127.5 - 20) / 4))


@pytest.mark.parametrize("flip", [True, False])
def test_about_half_of_a_batch_is_mirrored_and_its_timesteps_are_stratified(face_folder, flip):
    images = read_folder_images(face_folder, 16).images.repeat(10, 1, 1, 1)
    batch, again = (draw_batch(images, 900, flip, seeded_generator(0, 1, 0)) for _ in range(2))
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    x0 = batch["x0"]
    assert x0.shape == batch["eps"].shape == (300, 3, 16, 16)
    assert sorted((batch["t"] // 3).tolist()) == list(range(300))
    mirrored = x0[:, 0, 0, 0] > x0[:, 0, 0, -1]
    assert (0.4 < mirrored.double().mean() < 0.6) if flip else not mirrored.any()
    assert torch.equal(torch.where(mirrored[:, None, None, None], x0.flip(3), x0), to_unit_range(images))


def test_a_run_lowers_the_loss_and_leaves_weights_that_draw(arguments, noise_folder, tmp_path, draw_faces):
    often = "--validate-every 5 --save-every 40 --sample-every 40".split()
    path, folder = train.main(arguments(*often, *"--steps 40 --lr 1e-2 --warmup 1 --ema 0.5".split())), tmp_path / "run"
    losses = [line["validation_loss"] for line in metrics(folder) if "validation_loss" in line]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    tensors, about = load_tensors(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {"kind": "FaceUNet", "prediction": "v", "image_size": 16, "step": 40}.items() <= about.items()
    assert about["schedule"]["name"] == "cosine"
    assert about["validation_loss"] == pytest.approx(losses[-1])
    with Image.open(folder / "samples_00000040.png") as image:
        assert image.size == (8 * 18 + 2, 4 * 18 + 2)
    for weights in (path, folder / "best.safetensors", folder / "state_00000040.safetensors"):
        assert len(draw_faces(noise_folder, weights=weights)) == 4


def test_the_same_command_resumes_exactly(arguments, tmp_path):
    flags = ["--decay-fraction", "0", "--warmup", "1", "--lr", "1e-2"]
    half_way = load_tensors(train.main(arguments(*flags, "--steps", "2")))[0]
    resumed = load_tensors(train.main(arguments(*flags)))[0]
    straight = load_tensors(train.main(arguments(*flags, "--out", tmp_path / "straight")))[0]
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert any(not torch.equal(resumed[name], half_way[name]) for name in half_way)


def test_held_out_images_are_validated_on_and_never_trained_on(arguments, monkeypatch):
    seen = {"train": [], "validate": set()}
    original = train.diffusion_loss

    def spy(model, batch, schedule, prediction, gamma):
        assert (schedule.name, prediction, gamma) == ("linear", "eps", 5.0)
        if torch.is_grad_enabled():
            seen["train"] += map(value, batch["x0"])
        else:
            seen["validate"] |= set(map(value, batch["x0"]))
        return original(model, batch, schedule, prediction, gamma)

    monkeypatch.setattr(train, "diffusion_loss", spy)
    train.main(arguments(*"--steps 9 --batch-size 3 --prediction eps --schedule linear".split()))
    assert sorted(seen["train"]) == [k for k in range(30) if k not in (9, 19, 29)]
    assert seen["validate"] == {9, 19, 29}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--data nowhere", "nowhere: no such folder"),
        ("--image-size 18", "--image-size 18"),
        ("--widths 8", "one entry a level"),
        ("--widths 7 8", "even"),
        ("--blocks 0", "blocks 0"),
        ("--dropout 1", "--dropout 1"),
        ("--min-snr-gamma -1", "--min-snr-gamma -1"),
        ("--data few", "9 images; give at least 10"),
    ],
)
def test_a_mistake_gives_one_line_and_no_run(arguments, tmp_path, flags, word, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    for k in range(9):
        Image.new("RGB", (16, 16)).save(tmp_path / "few" / f"{k}.png")
    assert word in refusal(train.main, arguments(*flags.split()))
    assert not (tmp_path / "run").exists()

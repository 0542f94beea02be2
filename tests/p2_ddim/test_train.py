"""Training on a folder of images: what a batch holds, what is held out, one run from start to resume."""

import json

import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors
from common.cli import run
from common.data import read_folder_images, to_unit_range
from common.runtime import seeded_generator
from common.schedule import NoiseSchedule
from p2_ddim import sample, train
from p2_ddim.train import FaceBatches


def value(picture):
    """Which of the fixture's pictures this is, read from its dark half, mirrored or not."""
    return ((picture.min() + 1) * 127.5 - 20) / 4


def test_batches_walk_through_all_images(face_folder):
    faces = read_folder_images(face_folder, 16)
    batches = FaceBatches(faces, NoiseSchedule(), 10, flip=True, seed=0)
    drawn = [batches(step, seeded_generator(0, 1, step)) for step in range(3)]
    assert sorted(round(float(value(x0))) for batch in drawn for x0 in batch["x0"]) == list(range(30))
    for batch in drawn:
        assert batch["x0"].shape == batch["eps"].shape == (10, 3, 16, 16)
        assert sorted((batch["t"] // 100).tolist()) == list(range(10))
    again = batches(1, seeded_generator(0, 1, 1))
    assert all(torch.equal(again[name], drawn[1][name]) for name in again)


@pytest.mark.parametrize("flip", [True, False])
def test_about_half_of_the_images_are_mirrored(face_folder, flip):
    faces = read_folder_images(face_folder, 16)
    batches = FaceBatches(faces, NoiseSchedule(), 300, flip, seed=0)
    x0 = batches(0, seeded_generator(0, 1, 0))["x0"]
    mirrored = x0[:, 0, 0, 0] > x0[:, 0, 0, -1]
    assert (0.4 < mirrored.double().mean() < 0.6) if flip else not mirrored.any()
    plain = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
    assert torch.equal(plain.unique(dim=0), to_unit_range(faces.images).unique(dim=0))


@pytest.fixture
def arguments(face_folder, tmp_path):
    def make(*flags):
        small = [
            "--patch-size",
            "2",
            "--widths",
            "8",
            "16",
            "--attention",
            "0",
            "1",
            "--image-size",
            "16",
            "--batch-size",
            "4",
        ]
        often = [
            "--steps",
            "4",
            "--save-every",
            "2",
            "--validate-every",
            "2",
            "--sample-every",
            "4",
            "--log-every",
            "1",
        ]
        paths = ["--data", str(face_folder), "--out", str(tmp_path / "run")]
        return train.parse_arguments([*paths, *small, *often, "--precision", "fp32", *flags])

    return make


def test_a_run_leaves_weights_that_draw(arguments, noise_folder, tmp_path, draw_faces):
    path = train.main(arguments())
    tensors, about = load_tensors(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    facts = {"kind": "FaceUNet", "prediction": "v", "image_size": 16, "step": 4}
    assert facts.items() <= about.items()
    assert about["schedule"]["name"] == "cosine"
    assert about["validation_loss"] > 0
    with Image.open(tmp_path / "run" / "samples_00000004.png") as image:
        assert image.size == (8 * 18 + 2, 4 * 18 + 2)
    for weights in (path, tmp_path / "run" / "best.safetensors", tmp_path / "run" / "state_00000004.safetensors"):
        assert len(draw_faces(noise_folder, tmp_path / weights.stem, weights)) == 4


def test_the_same_command_resumes_exactly(arguments, tmp_path):
    flags = ["--decay-fraction", "0", "--warmup", "1", "--lr", "1e-2"]
    half_way = load_tensors(train.main(arguments(*flags, "--steps", "2")))[0]
    resumed = load_tensors(train.main(arguments(*flags)))[0]
    straight = load_tensors(train.main(arguments(*flags, "--out", str(tmp_path / "straight"))))[0]
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert any(not torch.equal(resumed[name], half_way[name]) for name in half_way)


def test_the_network_predicts_eps_if_asked(arguments, monkeypatch):
    asked = []
    original = train.diffusion_loss
    monkeypatch.setattr(train, "diffusion_loss", lambda *args: asked.append(args[2:]) or original(*args))
    _, about = load_tensors(train.main(arguments("--prediction", "eps", "--schedule", "linear", "--steps", "1")))
    assert (about["prediction"], about["schedule"]["name"]) == ("eps", "linear")
    assert {(schedule.name, prediction, gamma) for schedule, prediction, gamma in asked} == {("linear", "eps", 5.0)}


def test_held_out_images_are_validated_on_and_never_trained_on(arguments, monkeypatch):
    seen = {"train": set(), "validate": set()}
    original = train.diffusion_loss

    def spy(model, batch, *rest):
        part = "train" if torch.is_grad_enabled() else "validate"
        seen[part] |= {round(float(value(x0))) for x0 in batch["x0"]}
        return original(model, batch, *rest)

    monkeypatch.setattr(train, "diffusion_loss", spy)
    train.main(arguments("--steps", "9"))
    assert seen == {"train": set(range(30)) - {9, 19, 29}, "validate": {9, 19, 29}}


def test_training_lowers_the_loss(arguments, tmp_path):
    often = ["--validate-every", "5", "--save-every", "40", "--sample-every", "40"]
    train.main(arguments("--steps", "40", "--lr", "1e-2", "--warmup", "1", "--ema", "0.5", *often))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--image-size", "18"], "--image-size 18"),
        (["--widths", "8"], "one entry a level"),
        (["--widths", "7", "8"], "even"),
        (["--dropout", "1"], "--dropout 1"),
        (["--min-snr-gamma", "-1"], "--min-snr-gamma -1"),
        (["--lr", "0"], "--lr 0"),
    ],
)
def test_a_mistake_gives_one_line_and_no_run(arguments, tmp_path, flags, word, capsys):
    with pytest.raises(SystemExit) as caught:
        run(train.main, arguments(*flags))
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert word in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_too_few_images_are_refused(arguments, tmp_path, capsys):
    folder = tmp_path / "few"
    folder.mkdir()
    for k in range(9):
        Image.new("RGB", (16, 16)).save(folder / f"{k}.png")
    with pytest.raises(SystemExit):
        run(train.main, arguments("--data", str(folder)))
    assert "9 images; give at least 10" in capsys.readouterr().err


def test_defaults_fit_together():
    args = train.parse_arguments([])
    config = train.model_config(args)
    assert config.stride == 8
    assert args.data.parts[-2:] == ("hw2_data", "faces")
    assert sample.WEIGHTS.name == "faces.safetensors"

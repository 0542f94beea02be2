"""Scores of folders whose right answers are known, the yardsticks, and a line for everything that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors
from common.cli import UserError
from common.data import LabelledImages
from common.metrics import frechet_distance, kernel_distance, precision_recall
from p1_ddpm import evaluate, sample
from p1_ddpm.judge import LeNet, judge_path, load_judge
from tests.p1_ddpm.conftest import striped, write_png

ROOT = Path(__file__).resolve().parents[2]
DIGITS = {"mnistm": (0, 2, 4, 6, 8), "svhn": (1, 3, 5, 7, 9)}


def judge_folder(out, judges, *flags):
    return evaluate.main(evaluate.parse_arguments([str(out), "--judges", str(judges), *map(str, flags)]))


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A clone without hw2_data."""
    monkeypatch.setattr(evaluate, "DATA", tmp_path / "hw2_data" / "digits")


@pytest.fixture
def graded(tmp_path, judges):
    """A grader's folder with eight images of each digit, all as the judge reads them except two of the twos."""
    model, _ = load_judge(judges, "mnistm")
    for domain, digits in DIGITS.items():
        images = striped(torch.tensor(digits).repeat(40), seed=5).images
        seen = evaluate.in_batches(model, images).argmax(dim=1)
        for digit in digits:
            chosen = images[seen == digit][:8]
            assert len(chosen) == 8
            for number, image in enumerate(chosen, start=1):
                label = 4 if domain == "mnistm" and digit == 2 and number > 6 else digit
                write_png(tmp_path / "out" / domain / f"{label}_{number + 10 * digit:03d}.png", image)
    return tmp_path / "out"


@pytest.mark.usefixtures("no_data")
def test_accuracy_counts_what_the_grader_counts(graded, judges, capsys):
    (result,) = judge_folder(graded, judges)
    assert result["mnistm"]["images"] == result["svhn"]["images"] == 40
    assert result["mnistm"]["accuracy"] == pytest.approx(38 / 40)
    assert result["svhn"]["accuracy"] == 1
    assert result["score"] == pytest.approx((38 / 40 + 1) / 2)
    assert result["mnistm"]["digits"] == pytest.approx({0: 1, 2: 1, 4: 0.8, 6: 1, 8: 1})
    printed = capsys.readouterr().out
    assert "95.00 %" in printed
    assert "mean of the two accuracies: 97.50 %" in printed
    held_out = load_judge(judges, "mnistm").about["held_out_accuracy"]
    assert f"{100 * held_out:.2f} % of real held-out images right" in printed


@pytest.mark.usefixtures("no_data")
def test_without_data_nothing_is_compared_and_a_line_says_so(graded, judges, capsys):
    (result,) = judge_folder(graded, judges)
    assert "frechet" not in result["svhn"]
    assert "nothing is compared with real images" in capsys.readouterr().out


@pytest.mark.usefixtures("no_data")
def test_other_sizes_are_resized_as_the_grader_does(graded, judges):
    for path in graded.rglob("*.png"):
        with Image.open(path) as image:
            enlarged = image.resize((84, 84), Image.Resampling.NEAREST)
        enlarged.save(path)
    (result,) = judge_folder(graded, judges)
    assert result["score"] == pytest.approx((38 / 40 + 1) / 2)


def spoil(out, what):
    if what == "no folder":
        for path in (out / "svhn").iterdir():
            path.unlink()
        (out / "svhn").rmdir()
    elif what == "empty":
        for path in (out / "svhn").iterdir():
            path.unlink()
    elif what == "folder":
        (out / "svhn" / "7_more").mkdir()
    else:
        (out / "svhn" / what).write_text("no picture")


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("no folder", r"svhn: no such folder; fill it with: bash hw2_1.sh"),
        ("empty", r"svhn: holds no images"),
        ("folder", r"svhn/7_more: not a readable image"),
        (".DS_Store", r"svhn/.DS_Store: a grader reads each file's digit from its first character"),
        ("grid.png", r"svhn/grid.png: a grader reads"),
        ("²_001.png", r"svhn/²_001.png: a grader reads"),
        ("3_notes.txt", r"svhn/3_notes.txt: not a readable image"),
        ("4_001.png", r"svhn/4_001.png: layout 2025 has no 4 in svhn; set --layout"),
    ],
)
def test_what_would_break_the_grader_is_an_error(graded, judges, what, line):
    spoil(graded, what)
    with pytest.raises(UserError, match=line) as caught:
        judge_folder(graded, judges)
    assert "\n" not in str(caught.value)


def test_other_bad_input(graded, judges, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"judge_mnistm.safetensors: no such judge"):
        judge_folder(graded, tmp_path)
    with pytest.raises(UserError, match=r"elsewhere: holds neither mnistm/train.csv nor svhn/train.csv"):
        judge_folder(graded, judges, "--data", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"--seeds: .* is already drawn"):
        judge_folder(graded, judges, "--seeds", 1)
    with pytest.raises(UserError, match="--record: nobody knows which weights"):
        judge_folder(graded, judges, "--record")
    with pytest.raises(UserError, match="--count 0"):
        judge_folder(graded, judges, "--count", 0)
    with pytest.raises(UserError, match=r"Classifier.pth: no such file"):
        judge_folder(graded, judges, "--classifier", tmp_path / "Classifier.pth")
    monkeypatch.setattr(evaluate, "DATA", tmp_path / "none")
    with pytest.raises(UserError, match="--nearest: needs the real images"):
        judge_folder(graded, judges, "--nearest", tmp_path / "n.png")
    assert not (tmp_path / "n.png").exists()


def test_one_line_and_exit_code_2_from_its_own_folder(tmp_path, judges):
    command = [sys.executable, "evaluate.py", str(tmp_path / "nothing"), "--judges", str(judges)]
    done = subprocess.run(command, cwd=ROOT / "p1_ddpm", capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nothing/mnistm: no such folder" in done.stderr


def numbered(labels):
    """Images whose first pixel is their number, so that they can be told apart after they were mixed."""
    labels = torch.tensor(labels)
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return LabelledImages(images, labels, [str(i) for i in range(len(labels))])


def test_compared_sets_have_equally_many_of_every_digit():
    sets = [numbered([0] * 9 + [1] * 2 + [5] * 4), numbered([1] * 7 + [0] * 3), numbered([5, 1, 0] * 20)]
    for part, whole in zip(evaluate.matched(sets), sets):
        assert part.labels.bincount(minlength=10).tolist() == [3, 2] + [0] * 8
        numbers = part.images[:, 0, 0, 0].long()
        assert len(numbers.unique()) == len(numbers)
        assert torch.equal(whole.labels[numbers], part.labels)


def test_distances_are_those_of_the_features_of_equal_counts(judges, stripes):
    loaded = load_judge(judges, "svhn")
    train, held = stripes.split()
    drawn = striped(torch.arange(70) % 10, seed=9)
    result = evaluate.compare(loaded, drawn, train, held)
    assert result["compared"] == 40  # held-out images are the scarcest: four of each digit
    # All held-out images are used, so only the choice among the others has to be followed.
    with torch.no_grad():
        chosen, reference, real = (
            loaded.model.features(part.images.float() / 127.5 - 1)
            for part in (*evaluate.matched([drawn, train, held])[:2], held)
        )
    for features, found in ((chosen, result), (reference, result["yardstick"])):
        assert found["frechet"] == pytest.approx(frechet_distance(features, real), rel=1e-4)
        assert found["kernel"] == pytest.approx(kernel_distance(features, real), abs=1e-5)
        assert (found["precision"], found["recall"]) == precision_recall(real, features, 3)


def test_copies_of_the_held_out_images_are_perfect_and_noise_is_not(judges, stripes):
    loaded = load_judge(judges, "svhn")
    train, held = stripes.split()
    copied = evaluate.compare(loaded, held, train, held)
    assert copied["frechet"] < 1e-6 < copied["yardstick"]["frechet"]
    assert copied["precision"] == copied["recall"] == 1
    noise = torch.randint(0, 256, held.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noisy = evaluate.compare(loaded, LabelledImages(noise, held.labels, held.names), train, held)
    assert noisy["frechet"] > 5 * noisy["yardstick"]["frechet"]
    assert noisy["recall"] < 0.2 < noisy["yardstick"]["recall"]


def test_digits_that_are_not_held_out_are_not_compared(judges, stripes):
    train, held = stripes.split()
    only_ones = held.take(held.labels == 1)
    drawn = striped(torch.full((9,), 2), seed=1)
    assert evaluate.compare(load_judge(judges, "svhn"), drawn, train, only_ones) == {}


def test_seeds_are_judged_as_the_folders_that_sample_would_write(
    tmp_path, judges, tiny_digit_weights, striped_digits, capsys
):
    flags = ["--weights", tiny_digit_weights, "--steps", 2, "--count", 3, "--layout", "2024", "--precision", "fp32"]
    flags += ["--guidance-scale", 3]
    common = ["--judges", judges, "--data", striped_digits]
    arguments = ["--seeds", 4, 5, *flags, *common, "--json", tmp_path / "rows.jsonl"]
    results = evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))
    assert [result["source"] for result in results] == ["seed 4", "seed 5"]
    assert "mean" in capsys.readouterr().out
    assert results[0]["mnistm"]["frechet"] != results[1]["mnistm"]["frechet"]
    sample.main(sample.parse_arguments([str(flag) for flag in (tmp_path / "five", *flags, "--seed", 5)]))
    (folder,) = judge_folder(
        tmp_path / "five", judges, "--layout", "2024", *common[2:], "--json", tmp_path / "rows.jsonl"
    )
    for part in ("score", "mnistm", "svhn"):
        assert folder[part] == results[1][part]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["seed 4", "seed 5", str(tmp_path / "five")]
    assert rows[1]["guidance_scale"] == 3.0
    assert rows[1]["svhn"]["yardstick"]["recall"] == results[1]["svhn"]["yardstick"]["recall"]


def test_the_nearest_figure_finds_a_copied_training_image(graded, judges, striped_digits, stripes, tmp_path, capsys):
    train, _ = stripes.split()
    copy = train.images[train.labels == 3][10]
    write_png(graded / "svhn" / "3_999.png", copy)
    judge_folder(graded, judges, "--data", striped_digits, "--nearest", tmp_path / "nearest.png")
    printed = capsys.readouterr().out.split("svhn: nearest of 360 training images")[1]
    smallest = {line.split(")")[0]: float(line.split()[-1]) for line in printed.splitlines() if line.startswith("(")}
    assert smallest["(pixels, drawn"] == 0
    assert smallest["(features, drawn"] < 1e-3
    assert smallest["(pixels, held-out"] > 1
    with Image.open(tmp_path / "nearest.png") as image:
        pixels = np.asarray(image)
    # The copy is the first column of the lower panel: the picture holds it twice, one above the other.
    enlarged = copy.permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
    found = [
        (row, column)
        for row in range(pixels.shape[0] - 83)
        for column in range(pixels.shape[1] - 83)
        if (pixels[row, column : column + 84 : 3] == enlarged[0, ::3]).all()
        and (pixels[row : row + 84, column : column + 84] == enlarged).all()
    ]
    assert len(found) == 3
    assert len({column for _, column in found}) == 1


def test_the_courses_classifier_is_scored_beside_the_judge(graded, judges, striped_digits, tmp_path, capsys):
    torch.manual_seed(1)
    lenet = LeNet()
    torch.save({"state_dict": lenet.state_dict()}, tmp_path / "Classifier.pth")
    (result,) = judge_folder(graded, judges, "--classifier", tmp_path / "Classifier.pth", "--data", striped_digits)
    right = 0
    for path in sorted((graded / "mnistm").iterdir()):
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 255
        right += int(lenet((pixels - 0.5) / 0.5).argmax()) == int(path.name[0])
    assert result["mnistm"]["classifier_accuracy"] == pytest.approx(right / 40)
    assert "classifier_accuracy" not in result["svhn"]
    assert 0 <= result["mnistm"]["classifier_held_out_accuracy"] < 1
    mean = 100 * (right / 40 + 1) / 2
    assert f"with the course's classifier for mnistm: {mean:.2f} %" in capsys.readouterr().out


def test_train_judge_writes_both_judges(tmp_path, striped_digits, graded, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "EPOCHS", {"mnistm": 0.3, "svhn": 0.3})
    arguments = ["--train-judge", "--data", striped_digits, "--judges", tmp_path / "new", "--device", "cpu"]
    paths = evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))
    assert paths == [judge_path(tmp_path / "new", domain) for domain in ("mnistm", "svhn")]
    assert sorted((tmp_path / "new").iterdir()) == paths  # no states, no logs
    about = load_tensors(paths[0])[1]
    assert about["held_out"] == 40
    assert f"{100 * about['held_out_accuracy']:.2f} % of 40 held-out images right" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "DATA", tmp_path / "none")
    (result,) = judge_folder(graded, tmp_path / "new")
    assert result["mnistm"]["judge_held_out_accuracy"] == about["held_out_accuracy"]


def test_record_keeps_the_means_in_the_weights(tmp_path, judges, tiny_digit_weights, no_data):
    weights = tmp_path / "tiny.safetensors"
    weights.write_bytes(tiny_digit_weights.read_bytes())
    flags = ["--weights", weights, "--steps", 1, "--count", 1, "--judges", judges, "--record", "--seeds", 4, 5]
    rows = evaluate.main(evaluate.parse_arguments([str(flag) for flag in flags]))
    (before, about), (after, recorded) = load_tensors(tiny_digit_weights), load_tensors(weights)
    assert all(torch.equal(before[name], after[name]) for name in before)
    figures = recorded.pop("figures")["2025"]
    assert recorded == about
    assert figures["seeds"] == [4, 5]
    assert figures["score"] == pytest.approx((rows[0]["score"] + rows[1]["score"]) / 2)
    mean = (rows[0]["svhn"]["accuracy"] + rows[1]["svhn"]["accuracy"]) / 2
    assert figures["svhn"] == {"accuracy": pytest.approx(mean)}

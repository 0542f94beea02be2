"""Scores of folders whose right answers are known, the yardsticks, and a line for everything that is wrong."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.data import LabelledImages
from common.metrics import frechet_distance, kernel_distance, precision_recall
from p1_ddpm import digits, evaluate, sample
from p1_ddpm.judge import LeNet, load_judge
from tests.p1_ddpm.conftest import striped, write_png
from tests.programs import read, run

DIGITS = {"mnistm": (0, 2, 4, 6, 8), "svhn": (1, 3, 5, 7, 9)}


def judge_folder(out, judges, *flags):
    return run(evaluate, out, "--judges", judges, *flags)


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A clone without hw2_data."""
    monkeypatch.setattr(digits, "DATA", tmp_path / "hw2_data" / "digits")


@pytest.fixture
def graded(tmp_path, judges):
    """A grader's folder with eight images of each digit, all as the judge reads them except two of the twos."""
    judge = load_judge(judges, "mnistm")
    for domain, labels in DIGITS.items():
        images = striped(torch.tensor(labels).repeat(40), seed=5).images
        seen = evaluate.apply_in_batches(judge, images).argmax(dim=1)
        for digit in labels:
            chosen = images[seen == digit][:8]
            assert len(chosen) == 8
            for number, image in enumerate(chosen, start=1):
                label = 4 if domain == "mnistm" and digit == 2 and number > 6 else digit
                write_png(tmp_path / "out" / domain / f"{label}_{number + 10 * digit:03d}.png", image)
    return tmp_path / "out"


@pytest.mark.usefixtures("no_data")
def test_accuracy_counts_what_the_grader_counts(graded, judges, capsys):
    results = judge_folder(graded, judges)
    (found,) = results["sets"]
    assert found["mnistm"]["images"] == found["svhn"]["images"] == 40
    assert found["mnistm"]["accuracy"] == pytest.approx(38 / 40)
    assert found["svhn"]["accuracy"] == 1
    assert found["score"] == pytest.approx((38 / 40 + 1) / 2)
    assert found["mnistm"]["accuracy_by_digit"] == pytest.approx({"0": 1, "2": 1, "4": 0.8, "6": 1, "8": 1})
    assert "frechet" not in found["svhn"]
    held_out = load_judge(judges, "mnistm").about["held_out_accuracy"]
    assert results["yardsticks"]["mnistm"] == {"held_out_images": {"images": 40, "accuracy": held_out}}
    printed = capsys.readouterr().out
    assert "nothing is compared with real images" in printed
    assert "95.00 %" in printed
    assert "mean of the two accuracies: 97.50 %" in printed


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("stray", "line"),
    [
        ("7_more/", r"svhn/7_more: not a readable image"),
        (".DS_Store", r"svhn/.DS_Store: a grader reads each file's digit from its first character"),
        ("grid.png", r"svhn/grid.png: a grader reads"),
        ("²_001.png", r"svhn/²_001.png: a grader reads"),
        ("3_notes.txt", r"svhn/3_notes.txt: not a readable image"),
        ("4_001.png", r"svhn/4_001.png: layout 2025 has no 4 in svhn; set --layout"),
    ],
)
def test_what_would_break_the_grader_is_an_error(graded, judges, stray, line):
    path = graded / "svhn" / stray
    path.mkdir() if stray.endswith("/") else path.write_text("no picture")
    with pytest.raises(UserError, match=line) as caught:
        judge_folder(graded, judges)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_data")
def test_other_bad_input(graded, judges, tmp_path):
    with pytest.raises(UserError, match=r"judge_mnistm.safetensors: no such weights file"):
        judge_folder(graded, tmp_path)
    with pytest.raises(UserError, match=r"--seeds: .* is already drawn"):
        judge_folder(graded, judges, "--seeds", 1)
    shutil.rmtree(graded / "svhn")
    with pytest.raises(UserError, match=r"svhn: no such folder; fill it with: bash hw2_1.sh"):
        judge_folder(graded, judges)
    (graded / "svhn").mkdir()
    with pytest.raises(UserError, match=r"svhn: holds no images"):
        judge_folder(graded, judges)


def test_compared_sets_have_equally_many_of_every_digit():
    labels = [0] * 9 + [1] * 2 + [5] * 4, [1] * 7 + [0] * 3, [5, 1, 0] * 20
    sets = [LabelledImages(torch.zeros(len(x), 1), torch.tensor(x), list(range(len(x)))) for x in labels]
    for part, whole in zip(evaluate.match_counts(sets), sets):
        assert part.labels.bincount(minlength=10).tolist() == [3, 2] + [0] * 8
        assert len(set(part.names)) == len(part.names)
        assert torch.equal(whole.labels[part.names], part.labels)


def test_distances_are_those_of_the_features_of_equal_counts(judges, stripes):
    judge = load_judge(judges, "svhn")
    train, held = stripes.split()
    drawn = striped(torch.arange(70) % 10, seed=9)
    of_drawn, of_train = evaluate.compare(judge, drawn, train, held)
    assert of_drawn["compared"] == of_train["images"] == 40  # held-out images are the scarcest: four of each digit
    # All held-out images are used, so only the choice among the others has to be followed.
    with torch.no_grad():
        chosen, reference, real = (
            judge.features(part.images.float() / 127.5 - 1)
            for part in (*evaluate.match_counts([drawn, train, held])[:2], held)
        )
    for features, found in ((chosen, of_drawn), (reference, of_train)):
        assert found["frechet"] == pytest.approx(frechet_distance(features, real), rel=1e-4)
        assert found["kernel"] == pytest.approx(kernel_distance(features, real), abs=1e-5)
        assert (found["precision"], found["recall"]) == precision_recall(real, features, 3)
    # Digits that are not held out are not compared.
    assert evaluate.compare(judge, drawn.take(drawn.labels == 2), train, held.take(held.labels == 1)) == ({}, {})


def test_seeds_are_judged_as_the_folders_that_sample_would_write(
    tmp_path, judges, tiny_digit_weights, striped_digits, capsys
):
    flags = ["--weights", tiny_digit_weights, *"--steps 2 --count 3 --precision fp32 --guidance-scale 3".split()]
    flags += ["--layout", "2024"]
    common = ["--judges", judges, "--data", striped_digits]
    results = run(evaluate, "--seeds", 4, 5, *flags, *common, "--json", tmp_path / "results.json")
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("seed 4", "seed 5", "mean", "standard error", "30 training images"))
    four, five = results["sets"]
    assert (four["source"], five["source"]) == ("seed 4", "seed 5")
    run(sample, tmp_path / "five", *flags, "--seed", 5)
    folder = run(evaluate, tmp_path / "five", "--layout", "2024", *common)
    assert folder["sets"] == [five | {"source": str(tmp_path / "five")}]
    assert folder["yardsticks"] == results["yardsticks"]
    frechet = [found["mnistm"]["frechet"] for found in (four, five)]
    assert results["mean"]["mnistm"]["frechet"] == {
        "mean": pytest.approx(np.mean(frechet)), "standard_error": pytest.approx(abs(frechet[0] - frechet[1]) / 2)
    }  # fmt: skip
    assert folder["mean"]["score"] == {"mean": pytest.approx(five["score"]), "standard_error": None}
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    digest = hashlib.sha256(tiny_digit_weights.read_bytes()).hexdigest()
    settings = {"seeds": [4, 5], "count": 3, "layout": "2024", "guidance_scale": 3.0, "steps": 2}
    assert results["settings"] == results["settings"] | settings | {"weights_sha256": digest}


def test_the_courses_classifier_is_scored_beside_the_judge(graded, judges, striped_digits, tmp_path, capsys):
    torch.manual_seed(1)
    lenet = LeNet()
    torch.save({"state_dict": lenet.state_dict()}, tmp_path / "Classifier.pth")
    flags = ["--classifier", tmp_path / "Classifier.pth", "--data", striped_digits]
    results = judge_folder(graded, judges, *flags)
    (found,) = results["sets"]
    right = 0
    for path in sorted((graded / "mnistm").iterdir()):
        pixels = torch.from_numpy(read(path)).permute(2, 0, 1)[None] / 255
        right += int(lenet((pixels - 0.5) / 0.5).argmax()) == int(path.name[0])
    assert found["mnistm"]["classifier_accuracy"] == pytest.approx(right / 40)
    assert "classifier_accuracy" not in found["svhn"]
    assert 0 <= results["yardsticks"]["mnistm"]["held_out_images"]["classifier_accuracy"] < 1
    mean = 100 * (right / 40 + 1) / 2
    assert f"with the course's classifier for mnistm: {mean:.2f} %" in capsys.readouterr().out

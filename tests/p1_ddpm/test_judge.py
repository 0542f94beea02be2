"""The judges learn, are measured honestly, and the course's LeNet gives the numbers that its own code would."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from common.checkpoint import load_tensors
from common.data import LabelledImages
from p1_ddpm import judge
from tests.programs import run


def test_a_judge_learns_and_its_file_holds_the_accuracy_on_held_out_images(judges, stripes):
    loaded = judge.load_judge(judges, "mnistm")
    right = 0
    for i in range(9, 400, 10):
        logits = loaded(stripes.images[i : i + 1].float() / 127.5 - 1)
        right += int(logits.argmax()) == int(stripes.labels[i])
    assert loaded.about["held_out_accuracy"] == pytest.approx(right / 40, abs=1e-12)
    assert right >= 0.95 * 40
    assert (loaded.about["held_out"], loaded.about["trained_on"]) == (40, 360)
    assert loaded.about["training"]["steps"] == 25 * 360 / 60


def test_held_out_images_are_never_trained_on(stripes, tmp_path):
    """Their labels may be anything: the weights come out the same."""
    wrong = stripes.labels.clone()
    wrong[9::10] = (wrong[9::10] + 1) % 10
    options = {"precision": "fp32", "device": "cpu", "batch_size": 60}
    states = []
    for labels, folder in ((stripes.labels, tmp_path / "a"), (wrong, tmp_path / "b")):
        images = LabelledImages(stripes.images, labels, stripes.names)
        states.append(load_tensors(judge.train_judge("svhn", images, 0.5, folder, (4, 4, 4), **options))[0])
    first, second = states
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_program_trains_a_small_judge_in_half_precision_for_each_domain(
    tmp_path, striped_digits, monkeypatch, capsys
):
    monkeypatch.setattr(judge, "EPOCHS", {"mnistm": 0.3, "svhn": 0.3})
    paths = run(judge, "--data", striped_digits, "--out", tmp_path, "--device", "cpu")
    assert paths == [judge.judge_path(tmp_path, domain) for domain in ("mnistm", "svhn")]
    assert sorted(tmp_path.iterdir()) == paths  # no states, no logs
    assert all(path.stat().st_size < 1.5e6 for path in paths)
    tensors, about = load_tensors(paths[1])
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert (about["domain"], about["held_out"]) == ("svhn", 40)
    assert f"{100 * about['held_out_accuracy']:.2f} % of 40 held-out images right" in capsys.readouterr().out


def test_batches_are_distorted_a_little_and_never_mirrored(stripes):
    images = torch.rand(16, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    smooth = nn.functional.avg_pool2d(images, 9, 1, 4)
    generator = torch.Generator().manual_seed(1)
    moved = judge.distort(smooth, generator)

    def likeness(a, b):
        return torch.cosine_similarity(a.flatten(1), b.flatten(1)).min().item()

    assert likeness(moved, smooth) > 0.7
    assert likeness(moved, smooth) < 1 - 1e-3
    assert likeness(moved, smooth) > likeness(moved, smooth.flip(3)) + 0.3
    assert torch.allclose(judge.distort(smooth, generator, turn=0, zoom=0), smooth, atol=1e-5)


def course_network() -> nn.Sequential:
    """The course's LeNet as its layers read, with random weights."""
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, 6, kernel_size=5), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2, 2),
        "conv2": nn.Conv2d(6, 16, kernel_size=5), "relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2, 2),
        "flatten": nn.Flatten(), "fc1": nn.Linear(16 * 4 * 4, 128), "relu3": nn.ReLU(),
        "fc2": nn.Linear(128, 64), "relu4": nn.ReLU(), "fc3": nn.Linear(64, 10),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("wrap", [lambda state: {"state_dict": state, "epoch": 3}, lambda state: state])
def test_the_courses_classifier_is_read_exactly(tmp_path, wrap):
    network = course_network()
    torch.save(wrap(network.state_dict()), tmp_path / "Classifier.pth")
    images = torch.rand(9, 3, 28, 28) * 2 - 1
    difference = judge.load_classifier(tmp_path / "Classifier.pth")(images) - network(images)
    assert difference.abs().max() < 1e-6

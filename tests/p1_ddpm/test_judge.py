"""The judges learn, are measured honestly, and the course's LeNet gives the numbers that its own code would."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from common.checkpoint import load_tensors, save_tensors
from common.cli import UserError
from common.data import LabelledImages
from p1_ddpm import judge
from tests.p1_ddpm.conftest import striped


def test_a_judge_learns_what_it_was_not_shown(judges):
    unseen = striped(torch.arange(100) % 10, seed=7)
    model, _ = judge.load_judge(judges, "mnistm")
    assert judge.correct(model, unseen).double().mean() >= 0.95


def test_the_accuracy_in_the_file_is_that_of_the_held_out_images(judges, stripes):
    loaded = judge.load_judge(judges, "mnistm")
    every_tenth = range(9, 400, 10)
    right = 0
    for i in every_tenth:
        logits = loaded.model(stripes.images[i : i + 1].float() / 127.5 - 1)
        right += int(logits.argmax()) == int(stripes.labels[i])
    assert loaded.about["held_out_accuracy"] == pytest.approx(right / 40, abs=1e-12)
    assert (loaded.about["held_out"], loaded.about["trained_on"]) == (40, 360)
    assert loaded.about["training"]["steps"] == 25 * 360 / 60


def test_held_out_images_are_never_trained_on(stripes, tmp_path):
    """Their labels may be anything: the weights come out the same."""
    wrong = stripes.labels.clone()
    wrong[9::10] = (wrong[9::10] + 1) % 10
    options = {"precision": "fp32", "device": "cpu", "batch_size": 60}
    small = judge.JudgeConfig(widths=(4, 4, 4))
    paths = [
        judge.train_judge("svhn", LabelledImages(stripes.images, labels, stripes.names), 0.5, folder, small, **options)
        for labels, folder in ((stripes.labels, tmp_path / "a"), (wrong, tmp_path / "b"))
    ]
    first, second = (load_tensors(path)[0] for path in paths)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_shipped_judges_would_be_small_and_in_half_precision(tmp_path, stripes):
    path = judge.train_judge("svhn", stripes, 0.01, tmp_path, batch_size=8, device="cpu")
    assert path.stat().st_size < 1.5e6
    tensors, about = load_tensors(path)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert about["domain"] == "svhn"


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


def test_a_batch_depends_on_its_step_alone(stripes):
    def draw(step):
        batches = judge.JudgeBatches(stripes, 16, seed=3)
        return batches(step, torch.Generator().manual_seed(step))

    once, again, other = draw(5), draw(5), draw(6)
    assert torch.equal(once["images"], again["images"])
    assert not torch.equal(once["images"], other["images"])
    assert once["images"].abs().max() <= 1


def test_a_training_step_runs_on_the_meta_device():
    """A tensor left on the CPU would raise: meta and CPU tensors do not mix."""
    model = judge.Judge().to("meta").train()
    batch = {"images": torch.empty(4, 3, 28, 28), "labels": torch.zeros(4, dtype=torch.long)}
    loss = judge.judge_loss(model, {name: tensor.to("meta") for name, tensor in batch.items()})
    loss.backward()
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())
    with torch.device("meta"):
        assert judge.LeNet()(torch.empty(4, 3, 28, 28)).shape == (4, 10)


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


def test_the_courses_classifier_is_read_exactly(tmp_path):
    network = course_network()
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "Classifier.pth")
    images = torch.rand(9, 3, 28, 28) * 2 - 1
    difference = judge.load_classifier(tmp_path / "Classifier.pth")(images) - network(images)
    assert difference.abs().max() < 1e-6


class Foreign:
    """Something that a safe reader must not build."""


@pytest.mark.parametrize(
    ("saved", "line"),
    [
        (None, "no such file"),
        (b"not a torch file", "holds more than plain tensors, or is no file of torch.save"),
        ({"state_dict": Foreign()}, "holds more than plain tensors, or is no file of torch.save"),
        ([1, 2], "has no state_dict"),
        ({"state_dict": {"conv1.weight": torch.zeros(6, 3, 5, 5)}}, "does not fit LeNet: 9 missing"),
    ],
)
def test_what_is_not_the_courses_classifier(tmp_path, saved, line):
    path = tmp_path / "Classifier.pth"
    if isinstance(saved, bytes):
        path.write_bytes(saved)
    elif saved is not None:
        torch.save(saved, path)
    with pytest.raises(UserError, match=line) as caught:
        judge.load_classifier(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_judge_and_another_model_are_named(tmp_path, judges):
    with pytest.raises(UserError, match=r"judge_svhn.safetensors: no such judge; .*--train-judge"):
        judge.load_judge(tmp_path, "svhn")
    tensors, about = load_tensors(judge.judge_path(judges, "svhn"))
    save_tensors(judge.judge_path(tmp_path, "svhn"), tensors, about | {"kind": "ContextUNet"})
    with pytest.raises(UserError, match="holds ContextUNet, not a Judge"):
        judge.load_judge(tmp_path, "svhn")

"""The training loop on a toy regression: averages, accumulation, clipping, precision, and what is logged."""

import functools
import json
import math

import pytest
import torch

from common.cli import UserError
from tests.toy_training import make_batch, make_trainer, squared_error, train
from tests.training import newest


def test_offloaded_it_takes_the_same_steps_and_averages(tmp_path):
    seen = []

    def validate(averaged):
        seen.append(averaged)
        return next(averaged.parameters()).mean()

    trainer = train(tmp_path / "offloaded", offload=True, validate=validate)
    train(tmp_path / "plain", validate=validate)
    (ours, _), (theirs, _) = newest(tmp_path / "offloaded"), newest(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(seen) == 12
    assert seen[0] is trainer.averaged
    train(tmp_path / "offloaded", offload=True, steps=8, validate=validate)
    train(tmp_path / "plain", steps=8, validate=validate)
    (ours, _), (theirs, _) = newest(tmp_path / "offloaded"), newest(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dropout_differs_between_steps_and_seeds(tmp_path):
    ones = {"x": torch.ones(8, 2, 4, 4), "y": torch.zeros(8, 1, 4, 4)}

    def losses(seed):
        trainer = make_trainer(tmp_path / str(seed), 0.5, lambda *_: ones, lr=1e-12, weight_decay=0.0, seed=seed)
        return [trainer.take_step()[0] for _ in range(4)]

    seen = losses(0) + losses(1)
    assert len(set(seen)) == 8


def test_the_loss_falls_and_is_logged(tmp_path):
    train(tmp_path, steps=60, lr=3e-2, save_every=100)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert sum(line["loss"] for line in lines[-5:]) < 0.8 * sum(line["loss"] for line in lines[:5])
    assert all(line["images_per_second"] > 0 and line["norm"] > 0 for line in lines)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_what_is_measured_of_the_averaged_model_stands_beside_its_validation_loss(tmp_path, capsys):
    def measure(averaged):
        return {"size": float(averaged.head.weight.square().sum())}

    batch = make_batch(0, torch.Generator().manual_seed(1))
    trainer = train(tmp_path, steps=2, validate=lambda averaged: squared_error(averaged, batch), measure=measure)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [1, 2]
    assert validated[-1]["size"] == measure(trainer.averaged)["size"] != validated[0]["size"]
    assert f"size {validated[-1]['size']:.4f}" in capsys.readouterr().out


def test_averages_are_their_closed_form_and_buffers_are_copied(tmp_path):
    snapshots = []
    trainer = make_trainer(tmp_path, steps=20, ema=0.6, save_every=100)
    for _ in range(20):
        trainer.take_step()
        snapshots.append(trainer.model.head.weight.detach().double().clone())
    # After n updates the decay is min(0.6, (1 + n) / (10 + n)); the first update copies.
    expected = snapshots[0]
    for n, weight in enumerate(snapshots[1:], start=1):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    assert (trainer.averaged.head.weight - expected).abs().max() < 1e-6
    assert (trainer.averaged.head.weight - trainer.model.head.weight).abs().max() > 1e-3
    assert trainer.averaged.passes == trainer.model.passes == 20
    assert not trainer.averaged.training


def test_accumulated_pieces_make_the_whole_batch(tmp_path):
    whole, pieces = train(tmp_path / "a", accumulate=1), train(tmp_path / "b", accumulate=4)
    assert pieces.model.passes == 4 * whole.model.passes
    for name, parameter in whole.state.trained.items():
        assert (parameter - pieces.state.trained[name]).abs().max() < 1e-6
    metrics = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in "ab"]
    for line, other in zip(*metrics):
        assert json.loads(line)["loss"] == pytest.approx(json.loads(other)["loss"], abs=1e-6)


def test_batches_must_divide(tmp_path):
    with pytest.raises(UserError, match=r"--batch-size 8: must be divisible by 1 processes x --accumulate 3"):
        make_trainer(tmp_path, accumulate=3)


def test_gradients_are_clipped(tmp_path):
    trainer = make_trainer(tmp_path, clip=0.01)
    norms = []

    def record(optimizer, *_):
        gradients = [parameter.grad.flatten() for parameter in trainer.state.trained.values()]
        norms.append(torch.cat(gradients).norm().item())

    trainer.state.optimizer.register_step_pre_hook(record)
    _, norm = trainer.take_step()
    assert norm > 0.1
    assert norms == pytest.approx([0.01], rel=1e-3)


def test_only_parameters_that_require_gradients_are_trained(tmp_path):
    trainer = train(tmp_path)
    assert (trainer.model.frozen == 0.5).all()
    assert not any(name.startswith("optimizer.frozen") for name in newest(tmp_path)[0])


def infinite_gradient(model, batch):
    """A finite loss whose gradient is not: the square root at zero."""
    return (model(batch["x"]) * 0).square().sum().sqrt()


def poisoned(step, generator):
    batch = make_batch(step, generator)
    return {name: tensor * math.nan if step == 3 else tensor for name, tensor in batch.items()}


@pytest.mark.parametrize(
    ("broken", "step", "words"),
    [
        ({"batches": poisoned}, 3, ["loss nan", "gradient norm nan"]),
        ({"loss": infinite_gradient}, 0, ["loss 0", "gradient norm nan"]),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_harm(tmp_path, broken, step, words):
    trainer = make_trainer(tmp_path, **broken)
    with pytest.raises(UserError) as caught:
        trainer.run()
    line = str(caught.value)
    assert line.startswith(f"step {step}: ")
    assert all(word in line for word in words)
    assert "learning rate" in line
    assert "--lr" in line
    states = sorted(path.name for path in tmp_path.glob("state_*"))
    assert states == [f"state_{saved:08d}.safetensors" for saved in range(1, step + 1)][-2:]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert trainer.step == step


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: is a file; name a folder"):
        make_trainer(tmp_path / "file")


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--precision fp16: training in fp16 needs a GPU"):
        make_trainer(tmp_path, precision="fp16")


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    seen = []

    def loss(model, batch):
        output = model(batch["x"])
        return (output.float() - batch["y"]).square().mean()

    trainer = make_trainer(tmp_path, precision="bf16", loss=loss)
    trainer.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in newest(tmp_path)[0].values())


def test_compiled_networks_save_the_same_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled, plain = train(tmp_path / "a", compile=True, steps=2), train(tmp_path / "b", steps=2)
    assert type(compiled.runnable) is not type(plain.runnable)
    assert newest(tmp_path / "a")[0].keys() == newest(tmp_path / "b")[0].keys()
    for name, parameter in plain.state.trained.items():
        assert (parameter - compiled.state.trained[name]).abs().max() < 1e-6

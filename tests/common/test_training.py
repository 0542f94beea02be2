"""The diffusion loss against its definition, and the training loop on a toy regression."""

import functools
import math
import threading

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.schedule import PREDICTIONS, NoiseSchedule
from common.training import DrawnAhead, diffusion_loss
from tests.toy_training import make_batch, make_trainer, squared_error, train
from tests.training import metrics, newest

SCHEDULE = NoiseSchedule("cosine")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 3, 4, 4, generator=generator)
    t = torch.randint(0, 1000, (64,), generator=generator)
    return {"x0": x0, "eps": eps, "t": t, "labels": t % 10, "hint": x0[:, :1]}


def zeros(xt, t, **condition):
    return torch.zeros_like(xt)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss(batch, prediction):
    def perfect(xt, t, labels, hint):
        assert torch.equal(xt, SCHEDULE.add_noise(batch["x0"], batch["eps"], batch["t"]))
        assert t is batch["t"]
        assert labels is batch["labels"]
        assert hint is batch["hint"]
        return SCHEDULE.target(batch["x0"], batch["eps"], t, prediction)

    assert diffusion_loss(perfect, batch, SCHEDULE, prediction, 5.0) == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0, 5.0])
def test_the_loss_is_the_weighted_squared_error(batch, prediction, gamma):
    target = SCHEDULE.target(batch["x0"], batch["eps"], batch["t"], prediction).double().numpy()
    alpha_bar = SCHEDULE.alphas_cumprod.numpy()[batch["t"]]
    snr = alpha_bar / (1 - alpha_bar)
    divisor = {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
    weights = np.minimum(snr, gamma) / divisor if gamma else 1
    expected = np.mean(weights * (target.reshape(64, -1) ** 2).mean(1))
    assert diffusion_loss(zeros, batch, SCHEDULE, prediction, gamma).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_the_network_in_fp32(batch):
    scale = torch.ones((), requires_grad=True)
    loss = diffusion_loss(lambda xt, t, **condition: (xt * scale).bfloat16(), batch, SCHEDULE, "eps", 5.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert scale.grad.isfinite()
    assert scale.grad != 0


def test_offloaded_it_takes_the_same_steps_and_averages(tmp_path):
    seen = []

    def validate(averaged):
        seen.append(averaged)
        return next(averaged.parameters()).mean()

    for steps in (6, 8):  # and it goes on from its state
        trainer = train(tmp_path / "offloaded", steps=steps, offload=True, validate=validate)
        assert seen[-1] is trainer.averaged
        train(tmp_path / "plain", steps=steps, validate=validate)
        (ours, _), (theirs, _) = newest(tmp_path / "offloaded"), newest(tmp_path / "plain")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dropout_differs_between_steps_and_seeds(tmp_path):
    ones = {"x": torch.ones(8, 2, 4, 4), "y": torch.zeros(8, 1, 4, 4)}

    def losses(seed):
        trainer = make_trainer(tmp_path / str(seed), 0.5, lambda *_: ones, lr=1e-12, weight_decay=0.0, seed=seed)
        return [trainer.take_step()[0] for _ in range(4)]

    seen = losses(0) + losses(1)
    assert len(set(seen)) == 8


def test_what_is_measured_of_the_averaged_model_stands_beside_its_validation_loss(tmp_path, capsys):
    def measure(averaged):
        return {"size": float(averaged.head.weight.square().sum())}

    batch = make_batch(0, torch.Generator().manual_seed(1))
    trainer = train(tmp_path, steps=2, validate=lambda averaged: squared_error(averaged, batch), measure=measure)
    validated = [line for line in metrics(tmp_path) if "validation_loss" in line]
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
    assert (trainer.model.frozen == 0.5).all()
    assert trainer.averaged.passes == trainer.model.passes == 20
    assert not trainer.averaged.training


def test_accumulated_pieces_make_the_whole_batch(tmp_path):
    whole, pieces = train(tmp_path / "a", accumulate=1), train(tmp_path / "b", accumulate=4)
    assert pieces.model.passes == 4 * whole.model.passes
    for name, parameter in whole.state.trained.items():
        assert (parameter - pieces.state.trained[name]).abs().max() < 1e-6
    for line, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"accumulate": 3}, "--batch-size 8: must be divisible by 1 processes x --accumulate 3"),
        ({"precision": "fp16"}, "--precision fp16: training in fp16 needs a GPU"),
    ],
)
def test_options_that_do_not_suit_are_refused(tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        make_trainer(tmp_path, **options)


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


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    seen = []

    trainer = make_trainer(tmp_path, precision="bf16")
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


def test_the_next_batch_is_drawn_in_a_thread_while_this_one_is_worked_on():
    threads = {}

    def draw(step):
        threads[step] = threading.current_thread()
        return {"x": torch.full((2,), step)}

    batches = DrawnAhead(draw, 41)
    assert batches(5)["x"].tolist() == [5, 5]
    assert batches.waiting[6].result(10) is batches(6)
    assert threads[5] is threading.main_thread() is not threads[6]
    assert batches(40)["x"].tolist() == [40, 40]  # a run that goes on elsewhere, up to its last step
    assert batches.waiting == {}


def test_an_error_comes_with_its_own_step():
    batches = DrawnAhead(lambda step: {"x": torch.full((1,), 6 // (step - 1))}, 9)
    batches(0)
    with pytest.raises(ZeroDivisionError):
        batches(1)
    assert batches(2)["x"].tolist() == [6]

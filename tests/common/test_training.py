"""The training loop on a toy regression: exact resume, averages, accumulation, clipping, and what is kept on disk."""

import functools
import json
import math

import accelerate
import pytest
import torch
from torch import nn

from common import training
from common.checkpoint import load_about, load_tensors
from common.errors import UserError
from common.training import Trainer
from common.training_options import TrainingOptions

WIDTH = 24


class Toy(nn.Module):
    """A regression network with convolution, dropout and a buffer that counts forward passes."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.convolution = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.frozen = nn.Parameter(torch.full((WIDTH, 1, 1), 0.5), requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return self.head(self.dropout(torch.tanh(self.convolution(x) + self.frozen)))


def make_batch(step, generator):
    x = torch.randn(8, 2, 4, 4, generator=generator)
    return {"x": x, "y": x[:, :1] * x[:, 1:]}


def squared_error(model, batch):
    return (model(batch["x"]).float() - batch["y"]).square().mean()


def make_trainer(
    folder, dropout=0.0, batches=make_batch, loss=squared_error, validate=None, about=None, measure=None, **options
):
    settings = {"steps": 6, "batch_size": 8, "lr": 1e-2, "warmup": 2, "precision": "fp32", "device": "cpu"}
    settings |= {"save_every": 1, "log_every": 1, "validate_every": 1} | options
    torch.manual_seed(7)
    facts = {"kind": "Toy", "config": {"width": WIDTH}} if about is None else about
    return Trainer(Toy(dropout), TrainingOptions(**settings), folder, facts, batches, loss, validate, measure=measure)


def train(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.run()
    return trainer


def newest(folder):
    return load_tensors(sorted(folder.glob("state_*.safetensors"))[-1])


def same_states(a, b):
    """Whether the newest states of two folders agree in every bit of every tensor."""
    (tensors, about), (others, other_about) = newest(a), newest(b)
    assert tensors.keys() == others.keys()
    assert {key.split(".")[0] for key in tensors} == {"model", "ema", "optimizer"}
    return about == other_about and all(torch.equal(tensors[name], others[name]) for name in tensors)


def interrupted(at, batches=make_batch):
    """Batches that end the process, as far as it can tell, at a step."""

    def make(step, generator):
        if step == at:
            raise KeyboardInterrupt
        return batches(step, generator)

    return make


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


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(tmp_path, dropout):
    train(tmp_path / "whole", dropout=dropout, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", dropout=dropout, save_every=2, batches=interrupted(at=3))
    assert newest(tmp_path / "cut")[1]["step"] == 2
    train(tmp_path / "cut", dropout=dropout, save_every=2)
    assert same_states(tmp_path / "whole", tmp_path / "cut")


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


def test_log_lines_of_undone_steps_are_forgotten(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, save_every=2, batches=interrupted(at=3))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    train(tmp_path, save_every=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


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
    for name, parameter in whole.trained.items():
        assert (parameter - pieces.trained[name]).abs().max() < 1e-6
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
        gradients = [parameter.grad.flatten() for parameter in trainer.trained.values()]
        norms.append(torch.cat(gradients).norm().item())

    trainer.raw_optimizer.register_step_pre_hook(record)
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


def test_the_last_two_states_and_the_best_average_are_kept(tmp_path):
    losses, averages = iter([3.0, 1.0, 2.0, 4.0, 1.5, 1.0]), []

    def validate(averaged):
        averages.append({name: tensor.clone() for name, tensor in averaged.state_dict().items()})
        assert not averaged.training
        assert not torch.is_grad_enabled()
        return torch.tensor(next(losses))

    train(tmp_path, validate=validate)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["best.safetensors", "state_00000005.safetensors", "state_00000006.safetensors"]
    best, about = load_tensors(tmp_path / "best.safetensors")
    assert (about["step"], about["validation_loss"], about["kind"]) == (2, 1.0, "Toy")
    assert all(torch.equal(best[name], tensor) for name, tensor in averages[1].items())
    assert load_about(tmp_path / "state_00000006.safetensors")["best"] == 1.0


def test_the_best_is_remembered_over_a_restart(tmp_path):
    for steps, loss in ((2, 1.0), (3, 2.0)):
        train(tmp_path, steps=steps, validate=lambda _, loss=loss: torch.tensor(loss))
    assert load_about(tmp_path / "best.safetensors")["step"] == 1


def test_a_full_disk_leaves_the_earlier_state_whole(tmp_path, full_disk):
    train(tmp_path / "whole", steps=3)
    train(tmp_path / "full", steps=2, save_every=2)
    state = tmp_path / "full" / "state_00000002.safetensors"
    before, trainer = state.read_bytes(), make_trainer(tmp_path / "full", steps=3, save_every=3)
    with full_disk(len(before) // 2), pytest.raises(UserError, match=r"state_00000003.safetensors: cannot be written"):
        trainer.run()
    assert state.read_bytes() == before
    assert [path.name for path in (tmp_path / "full").glob("*.safetensors")] == [state.name]
    assert not list((tmp_path / "full").glob(".*"))


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    left = tmp_path / ".unfinished-abc"
    left.mkdir()
    (left / ".tmp123").write_bytes(b"half")
    assert train(tmp_path, steps=1).step == 1
    assert not left.exists()


def test_a_finished_run_is_not_trained_further(tmp_path):
    train(tmp_path)
    before = newest(tmp_path)
    again = train(tmp_path, batches=interrupted(at=6))
    assert again.step == 6
    assert newest(tmp_path)[1] == before[1]
    for name, tensor in again.averaged.state_dict().items():
        assert torch.equal(tensor, before[0][f"ema.{name}"])


def test_other_runs_states_are_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(UserError, match=r"state_00000004.safetensors: its config is not this run's"):
        make_trainer(tmp_path, about={"kind": "Toy", "config": {"width": 1}})
    with pytest.raises(UserError, match=r"its kind is not this run's"):
        make_trainer(tmp_path, about={"kind": "Judge", "config": {"width": WIDTH}})
    with pytest.raises(UserError, match=r"state_00000004.safetensors: is past --steps 3"):
        make_trainer(tmp_path, steps=3)
    (tmp_path / "state_00000004.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"state_00000004.safetensors: not a whole safetensors file"):
        make_trainer(tmp_path)


def test_changed_options_are_told(tmp_path, capsys):
    train(tmp_path, steps=2)
    capsys.readouterr()
    train(tmp_path, steps=3, lr=5e-3)
    said = capsys.readouterr().out
    assert said == f"resuming {tmp_path / 'state_00000002.safetensors'} with steps 2 -> 3, lr 0.01 -> 0.005\n"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: is a file; name a folder"):
        make_trainer(tmp_path / "file")


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--precision fp16: training in fp16 needs a GPU"):
        make_trainer(tmp_path, precision="fp16")


class ScalingAccelerator(accelerate.Accelerator):
    """What accelerate does for fp16 on a GPU, on a CPU: a scaler, here one that soon overflows and soon grows."""

    def __init__(self, **options):
        super().__init__(**(options | {"mixed_precision": "fp16"}))
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, backoff_factor=2.0**-8, growth_interval=2)


def test_the_gradient_scale_survives_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Accelerator", ScalingAccelerator)
    whole = train(tmp_path / "whole", steps=9, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", steps=9, save_every=5, batches=interrupted(at=7))
    kept = newest(tmp_path / "cut")[1]["scaler"]
    assert kept["scale"] < 2.0**32  # it has overflowed
    train(tmp_path / "cut", steps=9, save_every=5)
    assert same_states(tmp_path / "whole", tmp_path / "cut")
    assert whole.accelerator.scaler.get_scale() > kept["scale"]  # and grown again
    assert not torch.equal(whole.model.head.weight, Toy().head.weight)


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
    for name, parameter in plain.trained.items():
        assert (parameter - compiled.trained[name]).abs().max() < 1e-6

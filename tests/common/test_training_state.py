"""What a training run keeps on disk, and how it goes on from there."""

import accelerate
import pytest
import torch

from common import training
from common.checkpoint import load_about, load_tensors
from common.cli import UserError
from common.training_state import PagedAdamW
from tests.toy_training import WIDTH, Toy, make_trainer, train
from tests.training import killed_at, metrics, newest, same_states


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(tmp_path, dropout):
    train(tmp_path / "whole", dropout=dropout, save_every=2)
    with killed_at(3):
        train(tmp_path / "cut", dropout=dropout, save_every=2)
    tensors, about = newest(tmp_path / "cut")
    assert about["step"] == 2
    assert {name.split(".")[0] for name in tensors} == {"model", "ema", "optimizer"}
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(tmp_path / "cut", dropout=dropout, save_every=2)
    assert same_states(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")  # the lines of undone steps are forgotten


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
    with full_disk(len(before) // 2), pytest.raises(UserError, match=r"state_00000003.safetensors: .*free space"):
        trainer.run()
    assert state.read_bytes() == before
    assert [path.name for path in (tmp_path / "full").glob("*.safetensors")] == [state.name]
    assert not list((tmp_path / "full").glob(".*"))


@pytest.mark.parametrize("harm", [lambda whole: whole[:-9], lambda whole: b"", lambda whole: bytes(len(whole))])
def test_a_broken_state_is_told_and_the_one_before_it_taken(tmp_path, harm, capsys):
    train(tmp_path / "whole")
    train(tmp_path / "harmed", steps=4)
    path = tmp_path / "harmed" / "state_00000004.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    capsys.readouterr()
    train(tmp_path / "harmed")
    told = capsys.readouterr()
    assert told.out.startswith(f"resuming {path.with_stem('state_00000003')} with steps 4 -> 6\n")
    assert told.err.startswith(f"note: {path}: ")
    assert told.err.endswith("; going on from the state before\n")
    assert same_states(tmp_path / "whole", tmp_path / "harmed")


def test_a_finished_run_is_not_trained_further(tmp_path):
    train(tmp_path)
    before = newest(tmp_path)
    again = train(tmp_path, batches=None)
    assert again.step == 6
    assert newest(tmp_path)[1] == before[1]
    for name, tensor in again.averaged.state_dict().items():
        assert torch.equal(tensor, before[0][f"ema.{name}"])


def test_other_runs_states_are_refused(tmp_path):
    train(tmp_path, steps=4)
    for options, complaint in (
        ({"about": {"kind": "Toy", "config": {"width": 1}}}, "its config is not this run's"),
        ({"about": {"kind": "Judge", "config": {"width": WIDTH}}}, "its kind is not this run's"),
        ({"steps": 3}, "is past --steps 3"),
    ):
        with pytest.raises(UserError, match=f"state_00000004.safetensors: {complaint}"):
            make_trainer(tmp_path, **options)
    for state in tmp_path.glob("state_*"):
        state.write_bytes(b"cut")
    with pytest.raises(UserError, match=r"state_00000003.safetensors: is a text file"):
        make_trainer(tmp_path)


def test_changed_options_are_told(tmp_path, capsys):
    train(tmp_path, steps=2)
    capsys.readouterr()
    train(tmp_path, steps=3, lr=5e-3)
    said = capsys.readouterr().out
    assert said == f"resuming {tmp_path / 'state_00000002.safetensors'} with steps 2 -> 3, lr 0.01 -> 0.005\n"


class ScalingAccelerator(accelerate.Accelerator):
    """What accelerate does for fp16 on a GPU, on a CPU: a scaler, here one that soon overflows and soon grows."""

    def __init__(self, **options):
        super().__init__(**(options | {"mixed_precision": "fp16"}))
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, backoff_factor=2.0**-8, growth_interval=2)


def test_the_gradient_scale_survives_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Accelerator", ScalingAccelerator)
    whole = train(tmp_path / "whole", steps=9, save_every=5)
    with killed_at(7):
        train(tmp_path / "cut", steps=9, save_every=5)
    kept = newest(tmp_path / "cut")[1]["scaler"]
    assert kept["scale"] < 2.0**32  # it has overflowed
    train(tmp_path / "cut", steps=9, save_every=5)
    assert same_states(tmp_path / "whole", tmp_path / "cut")
    assert whole.accelerator.scaler.get_scale() > kept["scale"]  # and grown again
    assert not torch.equal(whole.model.head.weight, Toy().head.weight)


def test_moments_of_one_parameter_at_a_time_are_on_the_device(tmp_path, monkeypatch):
    moves, move = [], PagedAdamW.move

    def watch(optimizer, parameter, device):
        moves.append((id(parameter), str(device)))
        if "exp_avg" in optimizer.state[parameter]:
            # The meta device stands for a GPU on the way there; on the way back the values must still be there.
            moments = [optimizer.state[parameter][name].clone() for name in ("exp_avg", "exp_avg_sq")]
            move(optimizer, parameter, torch.device("meta"))
            assert {optimizer.state[parameter][name].device.type for name in ("exp_avg", "exp_avg_sq")} == {"meta"}
            assert optimizer.state[parameter]["step"].device.type == "cpu"
            optimizer.state[parameter].update(zip(("exp_avg", "exp_avg_sq"), moments))

    monkeypatch.setattr(PagedAdamW, "move", watch)
    trainer = train(tmp_path, steps=1, offload=True)
    own = [id(parameter) for parameter in trainer.state.trained.values()]
    assert [key for key, _ in moves] == [key for key in own for _ in range(2)]
    assert {device for _, device in moves} == {"cpu"}

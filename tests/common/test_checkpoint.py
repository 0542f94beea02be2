"""Weights survive their way to disk and back, and every file that is not what it should be is refused in one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.checkpoint import load_about, load_model_file, load_strictly, load_tensors, save_tensors, to_half
from common.cli import UserError

ABOUT = {"kind": "Toy", "config": {"widths": [4, 8], "name": "é"}, "step": 3, "rate": 1e-4}


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "weight": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 2).T,
        "half": torch.randn(7).half(),
        "count": torch.tensor(5),
    }


def refused(call, *arguments):
    """The one line that the call complains with."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_and_facts_come_back(tmp_path, tensors):
    path = tmp_path / "new" / "weights.safetensors"
    save_tensors(path, tensors, ABOUT)
    loaded, about = load_tensors(path)
    assert about == load_about(path) == ABOUT
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert torch.equal(load_file(path)["transposed"], tensors["transposed"])  # any safetensors reader can
    (tmp_path / "own").touch()
    assert path.stat().st_mode == (tmp_path / "own").stat().st_mode


def test_every_truncation_is_refused(tmp_path, tensors):
    path, cut = tmp_path / "weights.safetensors", tmp_path / "cut.safetensors"
    save_tensors(path, tensors, ABOUT)
    data = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(data), 41), len(data) - 1]:
        cut.write_bytes(data[:length])
        assert "cut.safetensors: not a whole safetensors file" in refused(load_tensors, cut)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("absent.safetensors", "no such weights file"),
        ("", "is a folder"),
        ("pickle.pt", "holds weights without a config"),
        ("ours.safetensors", "holds Toy, not a Judge"),
        ("theirs.safetensors", "holds weights without a config"),
    ],
)
def test_what_is_not_the_models_weights_is_refused(tmp_path, tensors, name, complaint):
    torch.save(tensors, tmp_path / "pickle.pt")
    save_tensors(tmp_path / "ours.safetensors", tensors, ABOUT)
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    assert complaint in refused(load_model_file, tmp_path / name, "Judge")


def test_training_states_give_their_average(tmp_path):
    path = tmp_path / "state.safetensors"
    state = {"ema.a": torch.ones(2), "model.a": torch.zeros(2), "optimizer.a.exp_avg": torch.zeros(2)}
    save_tensors(path, state, ABOUT)
    loaded, about = load_model_file(path, "Toy")
    assert list(loaded) == ["a"]
    assert torch.equal(loaded["a"], torch.ones(2))
    assert about == ABOUT


def toy():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_come_off(prefix):
    source, target = toy(), toy()
    load_strictly(target, {prefix + name: tensor for name, tensor in source.state_dict().items()}, "file")
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


def test_misfits_are_counted_and_named():
    model = toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["0.bias"]
    state["0.weight"] = torch.zeros(4, 2)
    state |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    line = refused(load_strictly, model, state, "w.safetensors")
    assert line.startswith("w.safetensors: does not fit Sequential: ")
    assert "1 missing (0.bias)" in line
    assert "5 unexpected (extra0, extra1, extra2)" in line
    assert "1 of another shape (0.weight (4, 2) for (4, 3))" in line
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_shipped_weights_are_fp16_but_counts_stay():
    small = to_half(toy().state_dict())
    assert small["0.weight"].dtype == torch.float16
    assert small["1.num_batches_tracked"].dtype == torch.int64
    load_strictly(toy(), small, "file")

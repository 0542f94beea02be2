"""Weights survive their way to disk and back, and every file that is not what it should be is refused in one line."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.checkpoint import load_about, load_model_file, load_strictly, load_tensors, save_tensors, to_half
from common.cli import UserError
from common.output import remove_unfinished, write_atomically

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
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_prefix_selects(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"ema.a": torch.ones(1), "model.a": torch.zeros(1)}, ABOUT)
    assert load_tensors(path, "ema.")[0] == {"a": torch.ones(1)}


def test_full_disk_leaves_the_earlier_file_whole(tmp_path, full_disk, tensors):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, tensors, ABOUT)
    before = path.read_bytes()
    with full_disk(2000):
        line = refused(save_tensors, path, {"large": torch.zeros(1000)}, ABOUT)
    assert str(path) in line
    assert "free space" in line
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_writing_leaves_the_earlier_file_whole(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("whole")

    def write(temporary):
        assert temporary.name == path.name
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_places_are_named(tmp_path, tensors):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert "file/weights" in refused(save_tensors, tmp_path / "file" / "weights", tensors, ABOUT)
    assert "folder" in refused(save_tensors, tmp_path / "folder", tensors, ABOUT)


def test_only_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".unfinished-abc").mkdir()
    (tmp_path / ".unfinished-abc" / "state_00000010.safetensors").touch()
    kept = [tmp_path / "state_00000010.safetensors", tmp_path / ".hidden"]
    for path in kept:
        path.touch()
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_every_truncation_is_refused(tmp_path, tensors):
    path, cut = tmp_path / "weights.safetensors", tmp_path / "cut.safetensors"
    save_tensors(path, tensors, ABOUT)
    data = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(data), 41), len(data) - 1]:
        cut.write_bytes(data[:length])
        assert "cut.safetensors: not a whole safetensors file" in refused(load_tensors, cut)


def test_files_that_are_no_weights_are_refused(tmp_path):
    pickle = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(3)}, pickle)
    assert "no such weights file" in refused(load_model_file, tmp_path / "absent.safetensors", "Toy")
    assert "is a folder" in refused(load_model_file, tmp_path, "Toy")
    assert "not a whole safetensors file" in refused(load_model_file, pickle, "Toy")


def test_weights_of_another_model_are_refused(tmp_path, tensors):
    save_tensors(tmp_path / "a.safetensors", tensors, ABOUT)
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert "holds Toy, not a Judge" in refused(load_model_file, tmp_path / "a.safetensors", "Judge")
    assert "holds weights without a config" in refused(load_model_file, tmp_path / "b.safetensors", "Judge")


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


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
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

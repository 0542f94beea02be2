"""Weights files are read for what they contain, whoever wrote them, and what is none is called by its name."""

import argparse
import collections
import datetime
import enum
import functools
import gzip
import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.cli import UserError
from common.weights import STATE_DICTS, open_weights

STATE = {name: torch.full((2, 3), float(k)) for k, name in enumerate(["a.weight", "a.bias", "b.weight"])}


def read(path):
    file = open_weights(path)
    return dict(file.read(file.shapes))


def assert_read(path):
    found = read(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("name", ["w.pt", "w.CKPT", "w.safetensors", "w"])
def test_the_format_is_told_by_the_content(tmp_path, name):
    for save in (torch.save, save_file, functools.partial(torch.save, _use_new_zipfile_serialization=False)):
        save(STATE, tmp_path / name)
        assert_read(tmp_path / name)


def rename(start, end=""):
    return {start + name.replace(".", f".{end}"): tensor for name, tensor in STATE.items()}


WRAPPED = {
    **{key: {key: STATE, "epoch": 3, "optimizer": {"state": {0: {"step": 1.0}}}} for key in STATE_DICTS},
    "another key": {"net": STATE, "best": torch.tensor(0.5)},
    "DistributedDataParallel": rename("module."),
    "both": {"model": rename("module._orig_mod.")},
    "both, reversed": {"state_dict": rename("_orig_mod.module.")},
    "a part alone": rename("", "_orig_mod."),
    "AveragedModel": {"n_averaged": torch.tensor(3)} | rename("module."),
    "a default dictionary": collections.defaultdict(dict, {"state_dict": STATE}),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_the_state_dict_is_found(tmp_path, form):
    torch.save(WRAPPED[form], tmp_path / "w.pt")
    assert_read(tmp_path / "w.pt")


class Grade(enum.Enum):
    GOOD = 1


class Config(dict):
    """As omegaconf, attrdict or easydict: items and attributes."""

    class Inner:
        pass


class History(list):
    pass


def leftovers() -> dict:
    inner = Config.Inner()
    inner.x = {pathlib.Path("x"): Grade.GOOD}
    parts = argparse.Namespace(lr=1e-4), datetime.datetime(2025, 1, 1), np.float32(1), np.ones(3)
    lists = History([1, 2]), collections.deque([1.0], maxlen=3), collections.defaultdict(list, a=[1])
    return {"parts": parts, "lists": lists, "hyper": Config(a=Config(b=1)), "inner": inner, "class": Grade, "loss": abs}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_leftovers_are_passed_over_and_never_run(tmp_path, zipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", module := types.ModuleType("mine"))
    for kind in (Grade, Config, History):
        monkeypatch.setattr(kind, "__module__", "mine")
        setattr(module, kind.__name__, kind)
    torch.save({"state_dict": STATE} | leftovers(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "mine")
    assert_read(tmp_path / "w.pt")


@pytest.mark.parametrize("about", ["mine", "null", "[1]", "3", '"x"', '{"author": "x"}', "[" * 100_000])
def test_metadata_of_other_programs_is_none(tmp_path, about):
    save_file(STATE, tmp_path / "w.safetensors", {"about": about})
    assert "kind" not in open_weights(tmp_path / "w.safetensors").about
    assert_read(tmp_path / "w.safetensors")


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("best/UNet.pt", "")


def write(content: bytes):
    return lambda path: path.write_bytes(content)


def save(content, **options):
    return lambda path: torch.save(content, path, **options)


OTHERS = {
    "is a Git LFS pointer": write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "is a web page": write(b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>"),
    "is a text file that begins with 'Access denied'": write(b"Access denied"),
    "is a gzip archive": write(gzip.compress(b"x")),
    "is a zip archive of other files (best/UNet.pt)": archive,
    "is a TorchScript archive": lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
    "is a pickle that torch.save did not write by default": save(STATE, pickle_protocol=4),
    "a whole pickled model (torch.nn.modules.linear.Linear)": save(nn.Linear(2, 2)),
    "a whole pickled model (model: torch.nn.modules.linear.Linear)": save({"model": nn.Linear(2, 2), "epoch": 1}),
    "holds a whole pickled model": save(nn.Linear(2, 2), _use_new_zipfile_serialization=False),
    "EMA weights without their names": save({"decay": 0.9, "shadow_params": [torch.ones(2)]}),
    "but only epoch, loss": save({"epoch": 1, "loss": [0.5]}),
    "a has a shape but no numbers": save({"a": torch.ones(2, device="meta")}),
    "but one tensor of (3,)": save(torch.ones(3)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_called_by_their_names(tmp_path, what, suffix):
    OTHERS[what](path := tmp_path / f"w.{suffix}")
    with pytest.raises(UserError) as caught:
        open_weights(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert what in line
    assert "\n" not in line
    assert "truncated" not in line

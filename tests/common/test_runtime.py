"""Devices, precisions, and generators that depend on their key alone."""

import pytest
import torch

from common.cli import UserError
from common.runtime import PRECISIONS, pick_device, pick_precision, seeded_generator


def test_neighbouring_keys_give_unrelated_streams():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0, 1), (1, 1, 1), (2**40, 5)]
    streams = torch.stack([torch.randn(20_000, generator=seeded_generator(*key)) for key in keys])
    correlations = torch.corrcoef(streams) - torch.eye(len(keys))
    assert correlations.abs().max() < 0.03


def test_negative_seeds_are_refused():
    with pytest.raises(UserError, match="seed -1"):
        seeded_generator(-1, 4)


@pytest.mark.parametrize("name", ["cuda:77", "abacus", "", "meta", "mps"])
def test_devices_that_are_not_there_are_refused_in_one_line(name):
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert str(caught.value).startswith(f"--device {name}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300  # PyTorch lists all devices and dispatch keys that it knows


def test_every_launched_process_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert pick_device("cuda") == torch.device("cuda:3")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert taken == [torch.device("cuda:3"), torch.device("cuda:1")]
    assert pick_device("cpu") == torch.device("cpu")
    assert len(taken) == 2


def test_automatic_precision_is_exact_on_a_gpu():
    assert pick_precision("auto", torch.device("cuda")) == "fp32"
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    for name in PRECISIONS[1:]:
        assert pick_precision(name, torch.device("cpu")) == name
    with pytest.raises(UserError, match="--precision fp8"):
        pick_precision("fp8", torch.device("cpu"))

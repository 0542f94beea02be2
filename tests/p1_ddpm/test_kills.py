"""Ten SIGKILLs, some in the middle of a save: the same command each time must end as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_tensors

SCRIPT = Path(__file__).resolve().parents[2] / "p1_ddpm" / "train.py"
FLAGS = [
    *("--image-size", "8", "--widths", "8", "16", "--blocks", "1", "1", "--batch-size", "8", "--steps", "400"),
    *("--precision", "fp32", "--device", "cpu", "--save-every", "1", "--validate-every", "7", "--log-every", "1"),
    *("--sample-every", "150"),
]


def start(digits, out):
    command = [sys.executable, str(SCRIPT), "--data", str(digits), "--out", str(out), *FLAGS]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def unfinished(out):
    try:
        return list(out.glob(".unfinished-*/*"))
    except FileNotFoundError:  # the save ended between two looks at its folder
        return []


def wait_until(process, happened):
    deadline = time.monotonic() + 600
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline


def wait_for_the_moment(kind, process, out):
    """Any moment from the start on, any moment while it trains, or the midst of a save."""
    if kind == "any":
        time.sleep(random.Random(process.pid).uniform(0, 6))
        return
    before = set(out.glob("state_*"))
    wait_until(process, lambda: set(out.glob("state_*")) != before)
    if kind == "training":
        time.sleep(random.Random(process.pid).uniform(0, 0.4))
    else:
        wait_until(process, lambda: unfinished(out))


@pytest.mark.slow
def test_ten_kills_change_nothing(digits, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(digits, whole).wait() == 0
    kinds = ["any", "training", "save", "save", "training", "save", "any", "training", "save", "training"]
    cut_saves, steps = 0, []
    for kind in kinds:
        process = start(digits, killed)
        wait_for_the_moment(kind, process, killed)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        cut_saves += bool(unfinished(killed))
        steps.append(max((path.stem for path in killed.glob("state_*")), default="none"))
    print(f"states after each kill: {', '.join(steps)}; kills in the midst of a save: {cut_saves}")
    assert cut_saves >= 1
    assert len(set(steps)) >= 5
    assert start(digits, killed).wait() == 0
    assert not unfinished(killed)
    for name in ("state_00000399", "state_00000400", "best", "model"):
        tensors, about = load_tensors(whole / f"{name}.safetensors")
        others, other_about = load_tensors(killed / f"{name}.safetensors")
        assert about == other_about
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (whole, killed)]
    for log in logs:
        for line in log:
            line.pop("images_per_second", None)
    assert logs[0] == logs[1]

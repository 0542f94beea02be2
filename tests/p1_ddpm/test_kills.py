"""Ten SIGKILLs, some in the middle of a save: the same command each time must end as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.p1_ddpm.test_train import SMALL
from tests.shell import ROOT
from tests.training import metrics, same_files

OFTEN = "--steps 400 --save-every 1 --validate-every 7 --sample-every 150".split()


def start(digits, out):
    command = [sys.executable, ROOT / "p1_ddpm" / "train.py", "--data", digits, "--out", out, *SMALL, *OFTEN]
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


@pytest.mark.slow
def test_ten_kills_change_nothing(digits, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(digits, whole).wait() == 0
    cut_saves, newest = 0, set()
    for moment in ("any", "training", "save", "save", "training", "save", "any", "training", "save", "training"):
        before, process = set(killed.glob("state_*")), start(digits, killed)
        if moment == "any":
            time.sleep(random.Random(process.pid).uniform(0, 6))
        else:
            wait_until(process, lambda before=before: set(killed.glob("state_*")) != before)
            if moment == "training":
                time.sleep(random.Random(process.pid).uniform(0, 0.4))
            else:
                wait_until(process, lambda: unfinished(killed))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        cut_saves += bool(unfinished(killed))
        newest.add(max((path.stem for path in killed.glob("state_*")), default="none"))
    assert cut_saves >= 1
    assert len(newest) >= 5
    assert start(digits, killed).wait() == 0
    assert not unfinished(killed)
    for name in ("state_00000399", "state_00000400", "best", "model"):
        assert same_files(whole / f"{name}.safetensors", killed / f"{name}.safetensors"), name
    assert metrics(whole) == metrics(killed)

"""hw2_3.sh with a stand-in for Python that says how it was called."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def recorder(path: Path, name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name}" "$PWD" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "a tree").mkdir()
    return Path(shutil.copy(ROOT / "hw2_3.sh", tmp_path / "a tree"))


def call(script, *arguments, cwd, **environment):
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"} | environment
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["my prompt.json", "hints", "out", "sd-v1-4.ckpt"],
        ["/prompt.json", "/hints", "/out"],
        ["prompt.json", "hints", "out", "--seed", "3"],
        ["--steps", "10"],
        ["--help"],
    ],
)
def test_hands_on_every_argument_from_the_callers_folder(script, tmp_path, arguments):
    python, caller = recorder(tmp_path / "my python", "named"), tmp_path / "called from here"
    caller.mkdir()
    result = call(script, *arguments, cwd=caller, PYTHON=str(python))
    expected = ["named", str(caller), str(script.parent / "p3_controlnet" / "sample.py"), *arguments]
    assert (result.returncode, result.stdout.splitlines()) == (0, expected)


def test_named_python_then_venv_then_path(script, tmp_path):
    recorder(tmp_path / "bin" / "python3", "path")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert call(script, "prompt.json", "hints", "out", cwd=tmp_path, PATH=path).stdout.startswith("path\n")
    recorder(script.parent / ".venv" / "bin" / "python", "venv")
    assert call(script, "prompt.json", "hints", "out", cwd=tmp_path, PATH=path).stdout.startswith("venv\n")
    named = str(recorder(tmp_path / "named", "named"))
    assert call(script, "prompt.json", "hints", "out", cwd=tmp_path, PATH=path, PYTHON=named).stdout.startswith(
        "named\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [""],
        ["table"],
        ["table", ""],
        ["table", "hints"],
        ["table", "hints", ""],
        ["table", "hints", "--seed"],
        ["", "a", "b"],
    ],
)
def test_half_named_folders_are_refused(script, tmp_path, arguments):
    python = recorder(tmp_path / "python", "named")
    result = call(script, *arguments, cwd=tmp_path, PYTHON=str(python))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hw2_3.sh: name the table, the hints and the output folder")
    assert result.stderr.count("\n") == 1

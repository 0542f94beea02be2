"""What a grader meets first: the wrappers, with a stand-in for Python, and the check of the weights."""

import hashlib
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.shell import ENVIRONMENT, ROOT, call
from tests.test_help import SCRIPTS

PROGRAMS = {
    "hw2_1.sh": "p1_ddpm/sample.py",
    "hw2_2.sh": "p2_ddim/sample.py",
    "hw2_3.sh": "p3_controlnet/sample.py",
    "hw2_3_2024.sh": "p3_personalization/generate.py",
}
ARGUMENTS = {
    "hw2_1.sh": ["out dir"],
    "hw2_2.sh": ["noise dir", "out dir", "UNet.pt"],
    "hw2_3.sh": ["my prompt.json", "hint dir", "out dir", "sd-v1-4.ckpt"],
    "hw2_3_2024.sh": ["my input.json", "out dir", "sd-v1-4.ckpt"],
}
# Too few arguments: neither the folder to write to, nor the wish for the examples or for help.
NO_OUTPUT = {
    "hw2_1.sh": ["", "''", "--seed 3"],
    "hw2_2.sh": ["''", "noise", "noise ''", "noise --eta 1", "'' out"],
    "hw2_3.sh": ["''", "json", "json hint", "json hint ''", "json '' out", "'' hint out", "json hint -q", "json -q o"],
    "hw2_3_2024.sh": ["''", "json", "json ''", "'' out", "json --seed 1"],
}


def executable(path: Path, script: str) -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + script)
    path.chmod(0o755)
    return path


def recorder(path: Path, name: str) -> Path:
    """A stand-in for Python that prints its name, its folder and its arguments, one a line."""
    return executable(path, f'printf "%s\\n" "{name}" "$PWD" "$@"\n')


@pytest.fixture
def tree(tmp_path) -> Path:
    """The wrappers alone, in a folder whose name has spaces."""
    tree = tmp_path / "a tree"
    tree.mkdir()
    for script in ROOT.glob("*.sh"):
        shutil.copy(script, tree)
    return tree


@pytest.fixture(params=PROGRAMS)
def script(request) -> str:
    return request.param


@pytest.mark.parametrize("linked", [False, True])
def test_hands_on_every_argument_from_the_callers_folder(tree, tmp_path, script, linked):
    python, called = recorder(tmp_path / "my python", "named"), tree / script
    if linked:
        called = tmp_path / "link.sh"
        called.symlink_to(tree / script)
    caller = tmp_path / "called from here"
    caller.mkdir()
    arguments = [*ARGUMENTS[script], "--seed", "3", "two words"]
    result = call("bash", called, *arguments, cwd=caller, PYTHON=python)
    expected = ["named", str(caller), str(tree / PROGRAMS[script]), *arguments]
    assert (result.returncode, result.stdout.splitlines()) == (0, expected)


def test_named_python_then_venv_then_path(tree, tmp_path, script):
    named = recorder(tmp_path / "named", "named")
    recorder(tmp_path / "bin" / "python3", "path")
    path = f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}"

    def which_python(**environment) -> str:
        result = call("bash", tree / script, *ARGUMENTS[script], PATH=path, **environment)
        return result.stdout.splitlines()[0]

    assert which_python() == "path"
    recorder(tree / ".venv" / "bin" / "python", "venv")
    assert which_python() == "venv"
    assert which_python(PYTHON=named) == "named"


@pytest.mark.parametrize(("script", "given"), [(script, given) for script in NO_OUTPUT for given in NO_OUTPUT[script]])
def test_no_output_argument(tree, tmp_path, script, given):
    python = recorder(tmp_path / "python", "named")
    result = call("bash", tree / script, *shlex.split(given), PYTHON=python)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert f"bash {script} " in result.stderr


@pytest.mark.parametrize(
    ("given", "code", "complaint"),
    [
        ("raise KeyboardInterrupt", -signal.SIGINT, "interrupted"),
        ("raise ModuleNotFoundError('No module named x')", 2, "No module named x; pip install -r requirements.txt"),
        ("raise ImportError('a.so: failed to map segment')", 2, "give it more memory (ulimit -v)"),
    ],
)
def test_what_ends_a_programs_imports_is_one_line(given, code, complaint, tmp_path):
    for name in ("torch", "numpy", "PIL", "tqdm", "psutil"):  # one of them comes first
        (tmp_path / f"{name}.py").write_text(given)
    for program in ("p1_ddpm/train.py", "p3_controlnet/sample.py"):
        result = call(sys.executable, program, PYTHONPATH=tmp_path)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (code, "", 1), program
        assert complaint in result.stderr, program


@pytest.mark.parametrize("program", SCRIPTS)
def test_every_program_imports_first_what_tells_of_it(program):
    text = (ROOT / program).read_text(encoding="utf-8")
    assert re.search(r"^sys\.path\.insert\(.*\n+(import common |from common\.)", text, re.MULTILINE)


def test_an_old_python_is_told():
    old = (
        f"import runpy, sys; sys.version_info = (3, 10); runpy.run_path({PROGRAMS['hw2_1.sh']!r}, run_name='__main__')"
    )
    result = call(sys.executable, "-c", old)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "is older than Python 3.11" in result.stderr


def test_exit_code_is_pythons(tree, tmp_path, script):
    python = executable(tmp_path / "python", "exit 7\n")
    assert call("bash", tree / script, *ARGUMENTS[script], PYTHON=python).returncode == 7


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("hw2_1.sh", ["--help"]),
        *((script, flags) for script in list(PROGRAMS)[1:] for flags in ([], ["--steps", "10"], ["--help"])),
        ("hw2_2.sh", ["/noise", "/out"]),
        ("hw2_2.sh", ["noise", "out", "--eta", "0.5"]),
        ("hw2_3.sh", ["prompt.json", "hints", "out"]),
        ("hw2_3_2024.sh", ["input.json", "out", "--count", "1"]),
    ],
)
def test_what_may_be_left_out_is_left_to_the_program(tree, tmp_path, script, arguments):
    result = call("bash", tree / script, *arguments, PYTHON=recorder(tmp_path / "python", "named"))
    assert (result.returncode, result.stdout.splitlines()[3:]) == (0, arguments)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("harm", ["is damaged", "is missing"])
def test_harmed_weights_are_named(tree, harm, which):
    files = [tree / folder / "weights" / "some.safetensors" for folder in ("p1_ddpm", "p9_other")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"one")
        (file.parent / "SHA256SUMS").write_text(f"{hashlib.sha256(b'one').hexdigest()}  {file.name}\n")
    files[which].unlink() if harm == "is missing" else files[which].write_bytes(b"onf")
    result = call("bash", tree / "hw2_download_ckpt.sh")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert f"{files[which]} {harm}" in result.stderr


def test_a_tree_without_weights_is_told(tree):
    result = call("bash", tree / "hw2_download_ckpt.sh")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)

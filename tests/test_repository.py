"""What a grader and a fresh machine meet first: the wrappers, the weights check, `make`, and the README's map."""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL_FILES = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]
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
# Variables of an outer make would reach the inner one.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEFILES", "CDPATH")
}


def call(*command, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end, with stdout and stderr as text."""
    arguments = [str(word) for word in command]
    env = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        arguments, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


def executable(path: Path, script: str) -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
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


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_parse_and_can_be_run(path):
    assert call("bash", "-n", path).stderr == ""
    assert os.access(path, os.X_OK)


class TestWrappers:
    """The grader's commands with a stand-in for Python that says how it was called."""

    @pytest.fixture(params=PROGRAMS)
    def script(self, request) -> str:
        return request.param

    def test_hands_on_every_argument_from_the_callers_folder(self, tree, tmp_path, script):
        python = recorder(tmp_path / "my python", "named")
        caller = tmp_path / "called from here"
        caller.mkdir()
        arguments = [*ARGUMENTS[script], "--seed", "3", "two words"]
        result = call("bash", tree / script, *arguments, cwd=caller, PYTHON=python)
        expected = ["named", str(caller), str(tree / PROGRAMS[script]), *arguments]
        assert (result.returncode, result.stdout.splitlines()) == (0, expected)

    def test_named_python_then_venv_then_path(self, tree, tmp_path, script):
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

    def test_works_through_a_symlink(self, tree, tmp_path, script):
        python = recorder(tmp_path / "python", "named")
        link = tmp_path / "link.sh"
        link.symlink_to(tree / script)
        result = call("bash", link, *ARGUMENTS[script], PYTHON=python)
        assert result.stdout.splitlines()[2] == str(tree / PROGRAMS[script])

    @pytest.mark.parametrize(
        ("script", "arguments"),
        [
            ("hw2_1.sh", []),
            ("hw2_1.sh", [""]),
            ("hw2_1.sh", ["--seed", "3"]),
            ("hw2_2.sh", [""]),
            ("hw2_2.sh", ["noise"]),
            ("hw2_2.sh", ["noise", ""]),
            ("hw2_2.sh", ["noise", "--eta", "1"]),
            ("hw2_3.sh", [""]),
            ("hw2_3.sh", ["prompt.json"]),
            ("hw2_3.sh", ["prompt.json", "hints"]),
            ("hw2_3.sh", ["prompt.json", "hints", ""]),
            ("hw2_3.sh", ["prompt.json", "", "out"]),
            ("hw2_3.sh", ["", "hints", "out"]),
            ("hw2_3.sh", ["prompt.json", "hints", "--seed", "1"]),
            ("hw2_3.sh", ["prompt.json", "--seed", "out"]),
            ("hw2_3_2024.sh", [""]),
            ("hw2_3_2024.sh", ["input.json"]),
            ("hw2_3_2024.sh", ["input.json", ""]),
            ("hw2_3_2024.sh", ["", "out"]),
            ("hw2_3_2024.sh", ["input.json", "--seed", "1"]),
        ],
    )
    def test_no_output_argument(self, tree, tmp_path, script, arguments):
        python = recorder(tmp_path / "python", "named")
        result = call("bash", tree / script, *arguments, PYTHON=python)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert f"bash {script} " in result.stderr

    def test_exit_code_is_pythons(self, tree, tmp_path, script):
        python = executable(tmp_path / "python", "exit 7\n")
        assert call("bash", tree / script, *ARGUMENTS[script], PYTHON=python).returncode == 7


class TestWeightsCheck:
    """hw2_download_ckpt.sh on two small files."""

    @pytest.fixture
    def weights(self, tree) -> list[Path]:
        files = []
        for folder, content in {"p1_ddpm": b"one", "p9_other": b"two"}.items():
            file = tree / folder / "weights" / "some.safetensors"
            file.parent.mkdir(parents=True)
            file.write_bytes(content)
            (file.parent / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  {file.name}\n")
            files.append(file)
        return files

    def test_whole(self, tree, weights, tmp_path):
        result = call("bash", tree / "hw2_download_ckpt.sh", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "hw2_download_ckpt.sh: all weights are whole (files checked: 2)\n"

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("harm", ["damaged", "missing"])
    def test_harmed(self, tree, weights, harm, which):
        weights[which].unlink() if harm == "missing" else weights[which].write_bytes(b"onf")
        result = call("bash", tree / "hw2_download_ckpt.sh")
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert f"{weights[which]} is {harm}" in result.stderr

    def test_nothing_to_check(self, tree):
        result = call("bash", tree / "hw2_download_ckpt.sh")
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1


def test_shipped_weights_are_listed_and_whole():
    shipped = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/weights/**/*.safetensors"))
    listed = []
    for sums in ROOT.glob("*/weights/SHA256SUMS"):
        for line in sums.read_text().splitlines():
            digest, name = line.split()
            assert hashlib.sha256((sums.parent / name).read_bytes()).hexdigest() == digest, name
            listed.append((sums.parent / name).relative_to(ROOT))
    assert shipped == sorted(listed)


class TestSetUp:
    """`make setup` with a stand-in for Python whose pip only writes down that it was called."""

    PIP = r"""
case "$*" in
    "-m pip install"*)
        echo "pip: ${*: -2}" >>calls
        sleep "${PIP_SECONDS:-0}"
        exit "${PIP_EXIT:-0}" ;;
    *) echo "unexpected: $*" >>calls; exit 1 ;;
esac
"""
    PYTHON = r"""
case "$*" in
    "-c import "*) "$REAL_PYTHON" "$@" && exit "${TOO_OLD:-0}" ;;
    "-m venv"*)
        folder=${*: -1}
        if [[ $* == *--clear* ]]; then rm -rf "$folder"; fi
        mkdir -p "$folder/bin" && cp "$PIP_SCRIPT" "$folder/bin/python"
        echo "venv: ${*:3}" >>calls ;;
    *) echo "unexpected: $*" >>calls; exit 1 ;;
esac
"""
    VENV, INSTALL = "venv: --clear .venv", "pip: -r requirements.txt"

    @pytest.fixture
    def clone(self, tmp_path) -> Path:
        clone = tmp_path / "a clone"
        clone.mkdir()
        shutil.copy(ROOT / "Makefile", clone)
        (clone / "requirements.txt").write_text("one==1\n")
        executable(tmp_path / "pip script", self.PIP)
        executable(tmp_path / "base python", self.PYTHON)
        return clone

    def command(self, clone: Path) -> list[str]:
        return ["make", "-C", str(clone), "setup", f"PYTHON={clone.parent / 'base python'}"]

    def environment(self, clone: Path, **more) -> dict[str, str]:
        return {"PIP_SCRIPT": str(clone.parent / "pip script"), "REAL_PYTHON": sys.executable} | more

    def start(self, clone: Path, **more) -> subprocess.Popen:
        env = ENVIRONMENT | self.environment(clone, **more)
        return subprocess.Popen(self.command(clone), env=env, stdout=subprocess.DEVNULL, start_new_session=True)

    def setup(self, clone: Path, **more) -> subprocess.CompletedProcess:
        return call(*self.command(clone), **self.environment(clone, **more))

    def calls(self, clone: Path) -> list[str]:
        """What was called since the last time one asked."""
        log = clone / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def test_once_and_again_when_requirements_change(self, clone):
        assert self.setup(clone).returncode == 0
        assert self.calls(clone) == [self.VENV, self.INSTALL]
        assert self.setup(clone).returncode == 0
        assert self.calls(clone) == []
        (clone / "requirements.txt").write_text("one==2\n")
        assert self.setup(clone).returncode == 0
        assert self.calls(clone) == [self.INSTALL]

    def test_failure_is_not_taken_for_done(self, clone):
        assert self.setup(clone, PIP_EXIT="1").returncode != 0
        assert self.calls(clone) == [self.VENV, self.INSTALL]
        assert self.setup(clone).returncode == 0
        assert self.calls(clone) == [self.VENV, self.INSTALL]

    def test_venv_made_by_hand_is_kept(self, clone):
        shutil.copy(executable(clone / "python", self.PIP), clone / ".venv.python")
        (clone / ".venv" / "bin").mkdir(parents=True)
        shutil.move(clone / ".venv.python", clone / ".venv" / "bin" / "python")
        assert self.setup(clone, PIP_EXIT="1").returncode != 0
        assert self.setup(clone).returncode == 0
        assert self.calls(clone) == [self.INSTALL, self.INSTALL]

    def test_two_at_once_install_once(self, clone):
        started = [self.start(clone, PIP_SECONDS="0.5") for _ in range(2)]
        assert [process.wait(timeout=60) for process in started] == [0, 0]
        assert self.calls(clone) == [self.VENV, self.INSTALL]

    def test_killed_set_up_is_begun_anew(self, clone):
        process = self.start(clone, PIP_SECONDS="30")
        deadline = time.monotonic() + 30
        while not (clone / "calls").exists() or self.INSTALL not in (clone / "calls").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, 9)
        process.wait()
        self.calls(clone)
        assert self.setup(clone).returncode == 0
        assert self.calls(clone) == [self.VENV, self.INSTALL]

    def test_old_python_is_refused(self, clone):
        result = self.setup(clone, TOO_OLD="1")
        assert result.returncode == 2
        assert "base python: not a Python 3.11 or newer" in result.stderr
        assert not (clone / ".venv").exists()

    def test_from_another_folder_without_minus_c(self, clone, tmp_path):
        named = f"PYTHON={tmp_path / 'base python'}"
        result = call("make", "-f", clone / "Makefile", "setup", named, cwd=tmp_path, **self.environment(clone))
        assert result.returncode == 0
        assert self.calls(clone) == [self.VENV, self.INSTALL]


class TestReadme:
    """The block under "How the code is laid out": names at the left margin are the root's, indented ones a folder's."""

    @pytest.fixture
    def layout(self) -> dict[str, set[str]]:
        """Names in the root, each with the names listed under it."""
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        block = re.search(r"## How the code is laid out\n.*?```\n(.*?)```", text, re.DOTALL)[1]
        layout, last = {}, ""
        for line in block.splitlines():
            # Two spaces or more part the names from their explanation.
            names = [name.rstrip("/") for name in re.split(r"\s{2,}", line.strip())[0].split()]
            if line.startswith("    "):
                layout[last].update(names)
            else:
                layout |= {name: set() for name in names}
                last = names[-1]
        return layout

    @pytest.fixture
    def files(self) -> list[Path]:
        """The repository's own files; an archive without .git cannot tell them from a user's, and has only the map."""
        listed = call("git", "ls-files").stdout if (ROOT / ".git").exists() else ""
        return [Path(name) for name in listed.splitlines()]

    def test_everything_on_the_map_is_there(self, layout):
        named = [ROOT / name for name in layout] + [ROOT / f / name for f, names in layout.items() for name in names]
        assert [path for path in named if not path.exists()] == []

    def test_everything_there_is_on_the_map(self, layout, files):
        unmapped = {file.parts[0] for file in files} - set(layout)
        for file in files:
            listed = layout.get(file.parts[0])
            if listed and len(file.parts) > 1 and file.name != "__init__.py" and file.parts[1] not in listed:
                unmapped.add("/".join(file.parts[:2]))
        assert not unmapped, "add these to the README's map"

"""What a fresh machine meets first: shell files that run, whole weights, `make setup`, and the README's map."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shell import ENVIRONMENT, ROOT, call, executable

SHELL_FILES = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_parse_and_can_be_run(path):
    assert call("bash", "-n", path).stderr == ""
    assert os.access(path, os.X_OK)


def test_shipped_weights_are_listed_and_whole():
    shipped = sorted(path.relative_to(ROOT) for path in ROOT.glob("*_*/**/weights/**/*.safetensors"))
    listed = []
    for sums in ROOT.glob("*_*/**/weights/SHA256SUMS"):
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

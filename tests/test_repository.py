"""What a fresh machine meets first: shell files that run, whole weights, `make setup`, and the README's map."""

import hashlib
import os
import re
from pathlib import Path

import pytest

from tests.shell import ROOT, call

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

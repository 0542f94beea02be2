"""What a fresh machine meets first: shell files that run, whole weights, and the README's map."""

import os
import re

import pytest

from tests.shell import ROOT, call

SHELL_FILES = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_parse_and_can_be_run(path):
    assert call("bash", "-n", path).stderr == ""
    assert os.access(path, os.X_OK)


def test_shipped_weights_are_listed_and_whole():
    files = ROOT.glob("*_*/**/weights/SHA256SUMS")
    listed = {sums.parent / line.split()[1] for sums in files for line in sums.read_text().splitlines()}
    assert listed == set(ROOT.glob("*_*/**/weights/**/*.safetensors"))
    result = call("bash", ROOT / "hw2_download_ckpt.sh")
    assert result.stdout == f"hw2_download_ckpt.sh: all weights are whole (files checked: {len(listed)})\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_every_folder_on_the_readmes_map_is_there():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## The map\n")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([\w/]+)/` \|", section, re.MULTILINE)
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / name).is_dir()] == []

"""Files and folders that are whole or not there."""

import signal
import sys

import pytest

from common.cli import UserError
from common.output import check_output_folder, stage_folder, write_atomically
from tests.shell import call

ENDED = """
import os, pathlib, signal, sys
from common.cli import run
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests may be run without, under nohup
from common.output import stage_folder
def main(args):
    with stage_folder(pathlib.Path(sys.argv[1])) as stage:
        (stage / "half").write_text("ha")
        os.kill(os.getpid(), int(sys.argv[2]))
run(main, None)
"""


def test_interrupted_writing_leaves_the_earlier_file_whole(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("whole")

    def write(temporary):
        assert temporary.name == path.name
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing(number, tmp_path):
    result = call(sys.executable, "-c", ENDED, tmp_path, int(number))
    assert (result.returncode, result.stderr) == (128 + number, "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    assert call(sys.executable, "-c", ENDED, tmp_path, 9).returncode == -9
    [left] = tmp_path.iterdir()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".unfinished-1-elsewhere-abc").mkdir()
    with stage_folder(tmp_path) as stage:
        write_atomically(tmp_path / "notes.txt", lambda temporary: temporary.write_text("whole"))
        names = {".hidden", ".unfinished-1-elsewhere-abc", stage.name, "notes.txt"}
        assert {path.name for path in tmp_path.iterdir()} == names
    assert left.name not in names


def fill(folder, *names):
    with stage_folder(folder) as stage:
        for name in names:
            (stage / name).write_text("new")


def test_staged_files_stay_out_where_one_has_no_place(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match=r"b\.png: is a folder"):
        fill(tmp_path, "a.png", "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (["a.png", "a.png/b.png"], r"a\.png/b\.png: cannot be written .*; choose another name"),
        (["a.png/b.png", "a.png"], r"a\.png: cannot be written .*; choose another name"),
        (["x" * 300], r"x: cannot be written \(File name too long\); choose another name"),
        (["folder"], r"folder: is a folder where a file is to go"),
        (["file/a/b.png"], r"file: is a file where a folder is to go"),
    ],
)
def test_files_without_a_place_are_refused_before_they_are_made(files, complaint, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=complaint), stage_folder(tmp_path, files):
        pytest.fail("drawn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_staged_files_vanish_on_failure(tmp_path):
    with pytest.raises(TypeError):
        fill(tmp_path, "a.png", None)
    assert not list(tmp_path.iterdir())


def test_output_folder_must_be_a_writable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        check_output_folder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot be written"):
        check_output_folder("/proc/digits")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"link: is a link to .*nowhere, which is not there; make"):
        check_output_folder(tmp_path / "link")

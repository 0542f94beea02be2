"""Files and folders that are whole or not there."""

import pytest

from common.cli import UserError
from common.output import check_output_folder, stage_folder, write_atomically


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


def fill(folder, *names):
    with stage_folder(folder) as stage:
        for name in names:
            (stage / name).write_text("new")


def test_staged_files_stay_out_where_one_has_no_place(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match=r"b\.png: is a folder"):
        fill(tmp_path, "a.png", "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


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

"""Text, JSON and folders as people hand them in, and names that no terminal can show."""

import os
import sys

import pytest

from common import cli
from common.cli import UserError
from common.files import list_files, read_json, read_text
from tests.shell import call


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ä\n".encode(), "ä\n"),
        (b"\xef\xbb\xbfa\r\nb\r", "a\nb\n"),
        ("ä".encode("latin-1"), "byte 0, in line 1"),
        (b"\xef\xbb\xbfa\n\xe4\n", "byte 5, in line 2"),
        ("a".encode("utf-16"), "byte 0, in line 1"),
    ],
)
def test_text_is_utf8_with_or_without_a_mark(content, text, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(content)
    if not text.startswith("byte"):
        assert read_text(path, "") == text
        return
    with pytest.raises(UserError) as caught:
        read_text(path, "")
    assert str(caught.value) == f"{path}: not UTF-8 text ({text}); save it as UTF-8"


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "9" * 10_000, '["\\ud800"]', "", "\0"])
def test_what_is_no_json_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: not JSON .*; mend it"):
        read_json(tmp_path / "a.json", "mend it")


def test_folders_are_listed_through_links_in_any_case_and_tell_what_is_left_out(tmp_path, capsys):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / "__MACOSX").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("b.PT", "a.pt", "7.heic", "b.txt", ".DS_Store", "._a.pt", "Thumbs.db", "__MACOSX/a.pt", "9.zip"):
        (folder / name).touch()
    (elsewhere / "c.Pt").touch()
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.pt").symlink_to(tmp_path / "absent")
    os.mkfifo(folder / "pipe.pt")
    names = ["a.pt", "b.PT", "dangling.pt", "link/c.Pt"]
    for _ in range(2):
        assert list_files(folder, (".pt",), "noises", below=True) == [folder / name for name in names]
    left_out = "3 files are left out, such as 7.heic: no noises by the name"
    assert capsys.readouterr().err == f"note: {folder}: {left_out}\n"
    assert list_files(folder, (".pt",), "noises") == [folder / name for name in names[:3]]
    with pytest.raises(UserError, match=r"data: holds no images, only files such as 7\.heic; name"):
        list_files(folder, (".png",), "images")


def test_a_note_is_printed_once_of_each_kind_by_the_first_process(monkeypatch, capsys):
    for about, rank in (("a", "0"), ("b", "1"), ("a", "0"), ("c", "0")):
        monkeypatch.setenv("RANK", rank)
        cli.note(f"test_a_note {about}", f"{about} is odd")
    assert capsys.readouterr().err == "note: a is odd\nnote: c is odd\n"


PROGRAM = "from common.cli import Parser, run; run(lambda args: print('\\udcff 圓'), Parser().parse_args([]))"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_stdout_that_cannot_show_a_name_ends_no_run(encoding):
    result = call(sys.executable, "-c", PROGRAM, PYTHONIOENCODING=encoding)
    circle = "\\u5713" if encoding == "ascii" else "圓"
    assert (result.returncode, result.stdout, result.stderr) == (0, f"\\udcff {circle}\n", "")

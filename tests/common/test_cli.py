"""What a user can mend reaches them as one line and exit code 2; everything else keeps its traceback."""

import errno
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

import common
from common.cli import LAUNCHED, Parser, UserError, run
from common.runtime import Processes
from tests.shell import call

# Tells far more than a pipe holds, then works on.
TELLING = """
import pathlib, sys
from common.cli import Parser, note, run, say
def main(args):
    for k in range(9999):
        print("a result"), say("a line"), note(str(k), "of something")
    args.file.write_text("done")
parser = Parser()
parser.add_argument("file", type=pathlib.Path)
run(main, parser.parse_args())
"""


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.csv row 3:\n  label 'x'"), 2, "error: a.csv row 3: label 'x'\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/log"), 2,
         "error: [Errno 28] No space left on device: 'out/log'\n"),
        (PermissionError(errno.EACCES, "Permission denied", "noise/00.pt"), 2,
         "error: noise/00.pt: Permission denied; check the path and its permissions\n"),
        (MemoryError(), 2, "error: the memory is full; choose smaller batches or images, or end other programs\n"),
        (InvalidCxxCompiler(), 2, "error: --compile: No working C++ compiler found in"
         " torch._inductor.config.cpp.cxx: (None, 'g++'); leave it out, or install a C++ compiler\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)  # fmt: skip
def test_one_line_and_an_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as caught:
        run(raising(error), None)
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def test_memory_that_pytorch_cannot_have_is_told_in_one_line(refusal):
    assert "smaller batches" in refusal(lambda _: torch.empty(2**50), Namespace())


@pytest.mark.parametrize("given", [["WORLD_SIZE"], LAUNCHED[:-1], LAUNCHED])
def test_a_process_is_one_of_several_only_where_a_launcher_says_all_of_it(given, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, "2")
    left = []
    run(lambda _: left.extend(name for name in LAUNCHED if name in os.environ), None)
    assert left == (list(given) if given == LAUNCHED else [])
    assert given == LAUNCHED or Processes().count == 1


@pytest.mark.parametrize("where", ["2>&1 | head -1", ">/dev/full", ">/dev/full 2>&1", ">&- 2>&-"])
def test_the_work_is_done_where_nobody_can_read_of_it(where, tmp_path):
    command = f'set -o pipefail; "$0" -c "$1" "$2" {where}'
    result = call("bash", "-c", command, sys.executable, TELLING, tmp_path / "file")
    assert (result.returncode, (tmp_path / "file").read_text()) == (0, "done")
    assert "Traceback" not in result.stderr
    assert (": printed lines are lost (No space left on device)" in result.stderr) == (where == ">/dev/full")


@pytest.mark.parametrize("error", [FileNotFoundError("x"), ValueError("x"), RuntimeError("x")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error), None)


def test_what_ends_imports_is_one_line_but_for_bugs(capsys):
    common.tell(ValueError, ValueError("bug"), None)
    common.tell(KeyboardInterrupt, KeyboardInterrupt(), None)
    with pytest.raises(SystemExit, match="2"):
        common.tell(ModuleNotFoundError, ModuleNotFoundError("No module named 'x'"), None)
    mended = f"error: {sys.executable}: No module named 'x'; pip install -r requirements.txt"
    assert capsys.readouterr().err.splitlines() == ["ValueError: bug", "interrupted", mended]


def test_parser_complains_in_one_line_and_keeps_line_breaks(capsys):
    parser = Parser(prog="draw.py", description="Draw.\n\npython draw.py OUT")
    parser.add_argument("--count", type=int, default=50, help="how many")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    for given, complaint in {"--count=many": "--count: invalid int value: 'many'", "": "OUT: is empty; name"}.items():
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([given])
        assert caught.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"draw.py: argument {complaint}")
        assert line.endswith(" (see --help)\n")
    assert "\npython draw.py OUT\n" in parser.format_help()


def test_help_shows_defaults_as_one_would_type_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parser = Parser(prog="draw.py")
    parser.add_argument("--weights", nargs="+", default=[Path.cwd() / "weights" / "a.pt", Path("/b.pt")], help="files")
    parser.add_argument("--sizes", nargs="+", default=[4, 8], help="of 100 % of them")
    parser.add_argument("--fast", action="store_true", help="or not")
    parser.add_argument("--share", default="5%", help="part")
    parser.add_argument("--csv", help="a file")
    shown = " ".join(parser.format_help().split())
    assert "files (default: weights/a.pt /b.pt)" in shown
    assert "of 100 % of them (default: 4 8)" in shown
    assert "part (default: 5%)" in shown
    assert "or not (default" not in shown
    assert shown.endswith("a file")


def test_quiet_may_stand_before_a_subcommand():
    parser = Parser(prog="train.py")
    parser.add_subparsers().add_parser("vae")
    assert [parser.parse_args(argv).quiet for argv in (["-q", "vae"], ["vae", "--quiet"])] == [True, True]
    assert not hasattr(parser.parse_args(["vae"]), "quiet")

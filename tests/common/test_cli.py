"""What a user can mend reaches them as one line and exit code 2; everything else keeps its traceback."""

import errno
from pathlib import Path

import pytest

from common.cli import Parser, UserError, run


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
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)  # fmt: skip
def test_one_line_and_an_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as caught:
        run(raising(error), None)
    assert caught.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [FileNotFoundError("x"), ValueError("x")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error), None)


def test_parser_complains_in_one_line_and_keeps_line_breaks(capsys):
    parser = Parser(prog="draw.py", description="Draw.\n\npython draw.py OUT")
    parser.add_argument("--count", type=int, default=50, help="how many")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--count", "many"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "draw.py: argument --count: invalid int value: 'many' (see --help)\n"
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

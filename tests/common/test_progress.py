"""Where stderr is no terminal a phase is one line, on a terminal a bar, and with --quiet nothing at all."""

import argparse
import io
import sys

import pytest

from common import cli as module
from common.cli import Parser, Progress, progress, run, say, silence


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


def work(items=3):
    """A phase with a phase inside each of its items."""
    for item in progress(range(items), "figures", "figure"):
        for _ in progress("ab", "faces", "step"):
            pass
        say(f"figure {item}")


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(module, "LONG", 0.0)


@pytest.mark.usefixtures("at_once")
def test_a_phase_is_one_line_where_stderr_is_no_terminal(capsys):
    work()
    told = capsys.readouterr()
    assert told.err == "figures: 3 figures\n"
    assert told.out == "figure 0\nfigure 1\nfigure 2\n"


def test_the_line_tells_how_long_it_will_take(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    with Progress(12, "train", "step", done=2) as phase:
        now[0] += 1.5
        phase.update()
        assert capsys.readouterr().err == ""
        now[0] += 1.5
        phase.update()
        assert capsys.readouterr().err == "train: 12 steps, about 00:12 left\n"
        now[0] += 60
        phase.update(8)
        assert phase.n == 12
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
def test_a_terminal_shows_bars(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "faces", "step") as phase:
        phase.bar.set_postfix(loss="0.1")
        phase.update(4)
        phase.update(-1)  # a batch that is drawn again
    assert phase.n == 3
    shown = terminal.getvalue()
    assert "\rfaces" in shown
    assert "loss=0.1" in shown
    assert "faces: 4 steps" not in shown


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_silences_progress_and_nothing_else(terminal, monkeypatch, capsys):
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())

    def main(args):
        work()
        print("a result")

    run(main, Parser(prog="draw.py").parse_args(["--quiet"]))
    assert capsys.readouterr() == ("a result\n", "")
    assert not terminal or sys.stderr.getvalue() == ""
    with pytest.raises(KeyError), silence(), Progress(3, "faces", "step"):
        raise KeyError
    run(main, argparse.Namespace())  # both have ended with their block
    told = capsys.readouterr()
    assert "figure 0\n" in told.out
    assert terminal or told.err == "figures: 3 figures\n"

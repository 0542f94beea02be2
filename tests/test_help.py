"""Every program helps in the same way: its flags by groups, --quiet, and an example that runs."""

import argparse
import contextlib
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest

from common.cli import Parser

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("latent_diffusion", "p[123]_*", "benchmarks", "docs", "studio")
    for path in ROOT.glob(f"{folder}/**/*.py")
    if "def parse_arguments(" in path.read_text(encoding="utf-8")
)
EXAMPLE = re.compile(r"^\s*(python .+?)(?:\s+#.*)?$", re.MULTILINE)


def module_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@pytest.fixture
def parsers(monkeypatch):
    """A function from a script to the parsers that it makes, the first one that of its whole command line."""

    def made(script):
        parsers, make = [], Parser.__init__

        def remember(self, **options):
            make(self, **options)
            parsers.append(self)

        monkeypatch.setattr(Parser, "__init__", remember)
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
            module_of(script).parse_arguments(["--help"])
        return parsers

    return made


def flags_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings}


def test_all_programs_are_looked_at():
    assert len(SCRIPTS) >= 29


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_stand_in_groups_with_a_word_on_each(script, parsers):
    for parser in parsers(script):
        assert {"-q", "--quiet"} <= flags_of(parser)
        general, *groups = [group for group in parser._action_groups if group.title != "positional arguments"]
        assert general.title == "general"
        loose = {flag for action in general._group_actions for flag in action.option_strings}
        assert loose <= {"-h", "--help", "-q", "--quiet", "--json"}
        assert any(group._group_actions for group in groups) or len(loose) == len(flags_of(parser))
        assert [action.dest for action in parser._actions if not action.help] == []
        shown = " ".join(parser.format_help().split())
        assert shown.count("(default: ") >= sum(
            action.default not in (None, argparse.SUPPRESS, False, (), []) for action in parser._actions
        )
        assert "Path(" not in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_can_be_parsed(script):
    module = module_of(script)
    commands = [line for text in EXAMPLE.findall(inspect.getdoc(module)) for line in text.split("&&")]
    own = [words for words in map(shlex.split, commands) if Path(words[1]).name == Path(script).name]
    assert own
    for words in own:
        assert isinstance(module.parse_arguments(words[2:]), argparse.Namespace)

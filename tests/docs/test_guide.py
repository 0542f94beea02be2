"""The pages for the reader: links lead somewhere, named functions are where they say, and commands can be given."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for pattern in ("README.md", "docs/*.md", "studio/*.md") for page in sorted(ROOT.glob(pattern))]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\.venv\S*/bin/)?python |torchrun |accelerate launch |bash hw2_")


def commands(page: Path) -> Iterator[tuple[Path, str]]:
    """A page's commands, each with its folder: what stands between backticks, and lines between fences.

    A `cd` holds to the end of its fence.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    yield from ((ROOT, " ".join(code.split())) for code in re.findall(r"`([^`]+)`", FENCED.sub("", text)))
    for block in FENCED.findall(text):
        folder = ROOT
        for line in block.splitlines():
            for command in re.split(r"; |&& ", line.partition(" #")[0]):
                folder = ROOT / command[3:].strip() if command.startswith("cd ") else folder
                yield folder, command.strip()


def program_of(folder: Path, words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs, and its arguments; None where it runs nothing of this repository's."""
    at = next((k for k, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
    if at is None:
        return None
    path = folder / words[at]
    if path.suffix == ".sh":
        called = re.search(r"\w+/\w+\.py", path.read_text())
        if not called:
            return None
        path = ROOT / called[0]
    assert path.exists(), f"{folder}: {words}"
    return ".".join(path.resolve().relative_to(ROOT).with_suffix("").parts), words[at + 1 :]


def defines(file: Path, name: str) -> bool:
    """Whether a Python file has a function, class or constant of that name; of `Class.method`, both."""
    text = file.read_text(encoding="utf-8")
    return all(re.search(rf"^\s*(?:def|class) {part}\b|^{part} = ", text, re.MULTILINE) for part in name.split("."))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_headings_and_functions(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"[{text}]({target})"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            ]  # as GitHub does
            assert fragment in anchors, f"[{text}]({target})"
        name = re.fullmatch(r"`([A-Za-z_][\w.]*)`", text)
        if file.suffix == ".py" and name and not name[1].endswith(".py"):
            assert defines(file, name[1]), f"[{text}]({target})"


def test_functions_that_the_report_names_are_there():
    template = (ROOT / "docs" / "report" / "template.html").read_text(encoding="utf-8")
    named = re.findall(r"([\w.]+) in (\w+/\w+\.py)", template)
    assert named
    assert [(name, file) for name, file in named if not defines(ROOT / file, name)] == []


def test_commands_can_be_given(capsys):
    """Each command, of the pages and of `make demo`, names a program that is there, with arguments that it takes."""
    looked_at, refused = 0, []
    given = [found for page in PAGES for found in commands(page) if COMMAND.match(found[1])]
    demo = re.findall(r"^\t\$\$PYTHON (.*?);", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(demo) >= 5
    for folder, command in [*given, *((ROOT, f"python {line}") for line in demo)]:
        if program := program_of(folder, shlex.split(command.replace(" ...", ""))):
            looked_at += 1
            try:
                importlib.import_module(program[0]).parse_arguments(program[1])
            except SystemExit as stopped:
                refused += [f"{command}: {capsys.readouterr().err}"] if stopped.code else []
    assert refused == []
    assert looked_at >= 40


@pytest.mark.parametrize("name", ["p1", "p2", "p3"])
def test_no_figures_are_typed_in(name):
    """Percentages, decimals and times stand in the blocks that the ablations write, and in commands' flags."""
    text = FENCED.sub("", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    text = re.sub(r"<!-- ([\w-]+) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    assert not re.search(r"\d+\.\d|\d ?%|\d (seconds|minutes)", text)

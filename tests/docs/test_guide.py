"""The pages for the reader: every link leads somewhere, every function that is named is where its link says."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ablations import ABLATIONS

ROOT = Path(__file__).resolve().parents[2]
GUIDE = [ROOT / "docs" / f"p{problem}.md" for problem in (1, 2, 3)]
PAGES = [ROOT / "README.md", ROOT / "docs" / "scale.md", *GUIDE]
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:\.venv\S*/bin/)?python |torchrun |accelerate launch |bash hw2_")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[str, str]]:
    """Texts and targets of a page's links, not of what stands between fences."""
    return LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))


def commands(page: Path) -> Iterator[tuple[Path, str]]:
    """The folders that a page's commands are given in, and the commands: lines between fences, and between backticks.

    A folder holds from its `cd` to the end of the section; what is not there is taken from the root.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    folder, fenced = ROOT, False
    for line in re.sub(r"`[^`\n]+\n[^`\n]+`", lambda found: found[0].replace("\n", " "), text).splitlines():
        if line.startswith("#") and not fenced:
            folder = ROOT
        elif line.startswith("```"):
            fenced = not fenced
        elif fenced:
            for command in re.split(r"; |&& ", line.partition(" #")[0]):
                if command.startswith("cd "):
                    folder = ROOT / command.removeprefix("cd ").strip()
                yield folder, command.strip()
        else:
            yield from ((folder, command) for command in re.findall(r"`([^`]+)`", line))


def program_of(folder: Path, words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs, and its arguments; None where it runs nothing of this repository's."""
    if words[:2] == ["python", "-m"]:
        return (words[2], words[3:]) if "." in words[2] else None
    at = next((k for k, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
    if at is None:
        return None
    path = next((path for path in (folder / words[at], ROOT / words[at]) if path.exists()), None)
    assert path, f"{folder}: {words}"
    if path.suffix == ".sh":
        called = re.search(r"\w+/\w+\.py", path.read_text())
        return (called[0].removesuffix(".py").replace("/", "."), words[at + 1 :]) if called else None
    return ".".join(path.resolve().relative_to(ROOT).with_suffix("").parts), words[at + 1 :]


def names_in(tree: ast.AST) -> set[str]:
    """Functions, classes and constants that a module or class defines; those within classes after a dot."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            names |= {node.name, *(f"{node.name}.{name}" for name in names_in(node))}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for text, target in links(page):
        if target.startswith(("https://", "http://")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"[{text}]({target})"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in {anchor(heading) for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_given(page):
    """Each command names a program that is there, with arguments that it takes."""
    looked_at, refused = 0, []
    for folder, command in commands(page):
        program = program_of(folder, shlex.split(command.replace(" ...", ""))) if COMMAND.match(command) else None
        if program is None:
            continue
        module, arguments = program
        try:
            importlib.import_module(module).parse_arguments(arguments)
        except SystemExit as stopped:
            if stopped.code:
                refused.append(command)
        looked_at += 1
    assert refused == []
    assert looked_at >= 2


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_functions_are_where_their_links_say(page):
    """A link to a program has a name in backticks for its text, which that file defines."""
    named = [(text, target) for text, target in links(page) if target.endswith(".py")]
    assert len(named) >= 10
    for text, target in named:
        name = re.fullmatch(r"`([\w.]+)`", text)
        assert name, f"[{text}]({target})"
        tree = ast.parse((page.parent / target).read_text(encoding="utf-8"))
        assert name[1] in names_in(tree), f"{target} has no {name[1]}"


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_no_figures_are_typed_in(page):
    """Percentages, decimals and seconds stand in blocks that the program writes, and nowhere else."""
    text = page.read_text(encoding="utf-8")
    for name in (name for name in ABLATIONS if name.startswith(page.stem)):
        block = rf"<!-- {name} -->.*?<!-- end of {name} -->"
        assert len(re.findall(block, text, re.DOTALL)) == 1
        text = re.sub(block, "", text, flags=re.DOTALL)
    # The flags of a command are not figures.
    assert not re.search(r"\d+\.\d|\d ?%|\d (seconds|minutes)", FENCED.sub("", text))


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_the_mathematics_closes(page):
    """Braces and dollars come in pairs, and fences are closed; GitHub shows the source else."""
    text = page.read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0
    formulas = re.findall(r"^```math\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert formulas
    plain = re.sub(r"`[^`\n]+`", "", FENCED.sub("", text))
    for paragraph in plain.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
    formulas += re.findall(r"\$([^$]+)\$", plain)
    for formula in formulas:
        depth = 0
        for mark in re.sub(r"\\[{}]", "", formula):
            depth += {"{": 1, "}": -1}.get(mark, 0)
            assert depth >= 0, formula
        assert depth == 0, formula
        assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula))


def test_the_readme_leads_to_every_page():
    targets = {target for _, target in links(ROOT / "README.md")}
    assert {f"docs/{page.name}" for page in GUIDE} <= targets

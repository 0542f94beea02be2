"""The program that measures ablations: what it keeps, what it writes into pages, and what it says of old figures."""

import json

import pytest
import torch

from benchmarks import ablations
from benchmarks.ablation_tables import Ablation, fingerprint, told
from benchmarks.ablation_training import run_folder
from benchmarks.pages import block_of
from common.cli import UserError

EMPTY = "before\n<!-- toy -->\nold\n<!-- end of toy -->\nafter\n"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def calls(monkeypatch, weights):
    """An ablation of nothing, the only one there is; the settings it was called with."""
    calls = []

    def measure(settings):
        calls.append(settings)
        return [{"variant": "on", "share": 0.5, "error": 1 / 3}, {"variant": "off", "error": 12345.678}]

    toy = Ablation(
        "toy.md", "nothing", {"count": (20, "things"), "scales": ([1.0, 2.5], "numbers"), "weights": (weights, "what")},
        measure, {"share": ("share", "{:.1%}"), "error": ("error", "{:.4g}")}, "{count} things at {scales}", "switch",
        ("weights",),
    )  # fmt: skip
    monkeypatch.setattr(ablations, "ABLATIONS", {"toy": toy})
    return calls


@pytest.fixture
def call(calls, tmp_path):
    """A function that runs the program on pages of its own."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "toy.md").write_text(EMPTY)

    def call(*arguments):
        return ablations.main(ablations.parse_arguments(["--docs", str(tmp_path / "docs"), *arguments]))

    return call


def table_of(weights, count=20, flags=""):
    return (
        "| switch | share | error |\n| --- | ---: | ---: |\n| on | 50.0% | 0.3333 |\n| off | - | 1.235e+04 |\n\n"
        f"{count} things at 1.0 2.5; the SHA-256 of the weights begins with {fingerprint(weights)}."
        f" `python benchmarks/ablations.py toy{flags} --write`"
    )


def test_measuring_prints_and_leaves_the_page_alone(call, calls, weights, tmp_path, capsys):
    result = call("toy", "--count", "7", "--scales", "3", "4", "--json", str(tmp_path / "a.json"))
    assert calls == [{"count": 7, "scales": [3.0, 4.0], "weights": weights}]
    assert json.loads((tmp_path / "a.json").read_text()) == result
    assert "| on | 50.0% | 0.3333 |" in capsys.readouterr().out
    assert (tmp_path / "docs" / "toy.md").read_text() == EMPTY
    assert not (tmp_path / "docs" / "ablations").exists()


def test_writing_keeps_the_figures_and_fills_in_the_block(call, weights, tmp_path):
    result = call("toy", "--write")
    page = tmp_path / "docs" / "toy.md"
    assert page.read_text() == f"before\n<!-- toy -->\n{table_of(weights)}\n<!-- end of toy -->\nafter\n"
    assert json.loads((tmp_path / "docs" / "ablations" / "toy.json").read_text()) == result


def test_pages_are_filled_in_from_the_figures_that_are_kept(call, calls, weights, tmp_path):
    page = tmp_path / "docs" / "toy.md"
    call("tables")
    assert block_of(page.read_text(), "toy", page)[1] == (
        "Not measured yet: run `python benchmarks/ablations.py toy --write`."
    )
    call("toy", "--write", "--count", "5")
    page.write_text(EMPTY)
    call("tables")
    assert block_of(page.read_text(), "toy", page)[1] == table_of(weights, count=5, flags=" --count 5")
    assert len(calls) == 1


def test_it_tells_what_has_been_measured_and_with_which_weights(call, weights, capsys):
    assert call() == {"toy": "not measured"}
    call("toy", "--write")
    assert call() == {"toy": "measured"}
    weights.write_bytes(b"two")
    assert call() == {"toy": "measured with other weights"}
    assert "toy" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "before\n<!-- toy -->\n"])
def test_a_page_that_cannot_take_the_table_is_told_before_measuring(call, calls, tmp_path, content):
    page = tmp_path / "docs" / "toy.md"
    page.unlink() if content is None else page.write_text(content)
    with pytest.raises(UserError, match=r"toy\.md"):
        call("toy", "--write")
    assert not calls
    assert content is None or page.read_text() == content


def test_bad_settings_and_figures_are_told(call, calls, tmp_path):
    with pytest.raises(UserError, match=r"--scales 1\.0 -2\.0: must not be below 0"):
        call("toy", "--scales", "1", "-2")
    assert not calls
    (tmp_path / "docs" / "ablations").mkdir()
    (tmp_path / "docs" / "ablations" / "toy.json").write_text("{")
    with pytest.raises(UserError, match=r"toy\.json: not a JSON file"):
        call("tables")


def test_the_pages_hold_the_figures_that_are_kept():
    for name, ablation in ablations.ABLATIONS.items():
        page = ablations.DOCS / ablation.page
        block = block_of(page.read_text(encoding="utf-8"), name, page)[1]
        assert block == ablations.block_text(ablations.DOCS, name), f"{name}: python benchmarks/ablations.py tables"


def test_every_ablation_says_its_settings():
    """The sentence beneath a table needs no figure that is not a setting, and tells all that a user may change."""
    for name, ablation in ablations.ABLATIONS.items():
        settings = {key: told(default) for key, (default, _) in ablation.settings.items()}
        assert ablation.facts.format(**settings), name
        args = ablations.parse_arguments([name])
        assert {key: getattr(args, key) for key in settings} == {k: d for k, (d, _) in ablation.settings.items()}


def test_fingerprints_tell_files_and_folders_apart(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    (folder / "a").rename(folder / "b")
    assert fingerprint(folder) != before
    torch.save(torch.ones(1), tmp_path / "file")
    assert len(fingerprint(tmp_path / "file")) == len(before) == 12


def test_a_run_has_a_folder_of_its_own_for_every_change(tmp_path):
    folders = {run_folder(tmp_path, *key) for key in (("a b", {"x": 1}), ("a b", {"x": 2}), ("c", {"x": 1}))}
    assert len(folders) == 3
    assert run_folder(tmp_path, "a b", {"x": 1, "y": 2}) == run_folder(tmp_path, "a b", {"y": 2, "x": 1})

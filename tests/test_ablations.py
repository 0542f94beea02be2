"""The program that measures ablations: what it keeps, and what it writes into pages."""

import json

import pytest

from benchmarks import ablations
from benchmarks.ablation_tables import Ablation, fingerprint, make_text, run_folder
from common.cli import UserError, format_default
from tests.programs import run

EMPTY = "before\n<!-- p1-toy -->\nold\n<!-- end of p1-toy -->\nafter\n"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def calls(monkeypatch, weights, tmp_path):
    """An ablation of nothing, the only one there is, with a page of its own; the settings it was called with."""
    calls = []

    def measure(settings):
        """Nothing."""
        calls.append(settings)
        return [{"variant": "on", "share": 0.5, "error": 1 / 3}, {"variant": "off", "error": 12345.678}]

    settings = {"count": (20, "things"), "scales": ([1.0, 2.5], "numbers"), "weights": (weights, "what")}
    columns = {"share": "{:.1%}", "error": "{:.4g}"}
    toy = Ablation(measure, settings, columns, "{count} things at {scales}", "switch")
    monkeypatch.setattr(ablations, "ABLATIONS", {"p1-toy": toy})
    monkeypatch.setattr(ablations, "DOCS", tmp_path)
    (tmp_path / "p1.md").write_text(EMPTY)
    return calls


def test_only_with_write_are_figures_kept_and_the_block_filled_in(calls, weights, tmp_path, capsys):
    run(ablations, "p1-toy", "--scales", "3", "4")
    assert calls == [{"count": 20, "scales": [3.0, 4.0], "weights": weights}]
    assert "| on | 50.0% | 0.3333 |" in capsys.readouterr().out
    assert (tmp_path / "p1.md").read_text() == EMPTY
    assert not (tmp_path / "ablations").exists()
    result = run(ablations, "p1-toy", "--count", "5", "--write")
    assert json.loads((tmp_path / "ablations" / "p1-toy.json").read_text()) == result
    assert (tmp_path / "p1.md").read_text() == (
        "before\n<!-- p1-toy -->\n"
        "| switch | share | error |\n| --- | ---: | ---: |\n| on | 50.0% | 0.3333 |\n| off | - | 1.235e+04 |\n\n"
        f"5 things at 1.0 2.5; the SHA-256 of the weights begins with {fingerprint(weights)}."
        " `python benchmarks/ablations.py p1-toy --count 5 --write`\n<!-- end of p1-toy -->\nafter\n"
    )


def test_a_page_without_the_block_is_told_before_measuring(calls, tmp_path):
    (tmp_path / "p1.md").write_text("before\n<!-- p1-toy -->\n")
    with pytest.raises(UserError, match=r"p1\.md: has no block from"):
        run(ablations, "p1-toy", "--write")
    assert not calls


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_the_pages_hold_the_figures_that_are_kept(name):
    ablation, path = ablations.ABLATIONS[name], ablations.DOCS / "ablations" / f"{name}.json"
    block = f"<!-- {name} -->\n{make_text(name, ablation, json.loads(path.read_text()))}\n<!-- end of {name} -->"
    assert block in (ablations.DOCS / f"{name[:2]}.md").read_text(encoding="utf-8")
    # What stands below the table tells every setting that a user may change.
    assert ablation.facts.format(**{key: format_default(default) for key, (default, _) in ablation.settings.items()})


def test_folders_differ_where_settings_or_weights_do(tmp_path, weights):
    settings = {"out": tmp_path, "steps": 1, "base": weights}
    folders = [run_folder(settings, "a b"), run_folder(settings | {"steps": 2}, "a b"), run_folder(settings, "c")]
    weights.write_bytes(b"two")
    assert len({*folders, run_folder(settings, "a b")}) == 4

"""The report shows what its commands made and wrote, holds all of it in one file, and says what is missing."""

import base64
import importlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from common.checkpoint import load_tensors, save_tensors
from common.cli import UserError
from docs.report import make, sections, tables
from docs.report.page import Figure, Table, equation, page
from docs.report.sections import Command, Need, Section
from docs.report.texts import TEXTS

FETCHING = ("script", "link", "iframe", "object", "embed", "base")


class Reader(HTMLParser):
    """Collects what a page would fetch, its images, its cells and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.tags, self.images, self.cells, self.words = [], [], [], [], []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.cell = tag == "td"
        self.addresses += [attributes[name] for name in ("src", "href", "srcset", "poster") if name in attributes]
        if tag == "img":
            self.images.append((attributes["alt"], base64.b64decode(attributes["src"].partition(",")[2])))

    def handle_data(self, data):
        self.words.append(data)
        if self.cell:
            self.cells.append(data)

    def handle_endtag(self, tag):
        self.cell = False


def is_self_contained(text: str) -> bool:
    reader = Reader(text)
    style = text.partition("<style>")[2].partition("</style>")[0]
    fetched = [address for address in reader.addresses if not address.startswith(("data:", "#"))]
    return not fetched and not set(FETCHING) & set(reader.tags) and "url(" not in style and "@import" not in style


@pytest.fixture
def programs(tmp_path):
    """A program that writes a figure and numbers and keeps count, and one that fails."""
    draw = tmp_path / "draw.py"
    draw.write_text(
        "import json, sys\nfrom pathlib import Path\nfrom PIL import Image\n"
        "figure, numbers, log = map(Path, sys.argv[1:4])\n"
        "Image.new('RGB', (3, 2), (1, 2, 3)).save(figure)\n"
        "numbers.write_text(json.dumps({'00.png': 0.125, 'mean': 0.125}))\n"
        "log.write_text(log.read_text() + 'drawn\\n' if log.exists() else 'drawn\\n')\n"
    )
    (tmp_path / "fail.py").write_text("import sys\nprint('a <b> & c', file=sys.stderr)\nsys.exit(2)\n")
    return tmp_path


@pytest.fixture
def report(programs, monkeypatch):
    """Makes the report of some sections and returns its text and the folder; their keys lend them their words."""

    def made(*chosen, out="out"):
        monkeypatch.setattr(make, "SECTIONS", {"p1": lambda args: list(chosen)})
        path = make.main(make.parse_arguments(["--only", "p1", "--out", str(programs / out), "--seed", "7"]))
        return path.read_text(encoding="utf-8")

    return made


def drawing(programs) -> tuple[Command, list[Figure], list]:
    figure, numbers = programs / "figure.png", programs / "numbers.json"
    command = Command([programs / "draw.py", figure, numbers, programs / "log"], [figure, numbers])
    return command, [Figure(figure, "What it shows.")], [lambda: tables.squared_errors(numbers)]


def test_a_section_shows_what_its_command_made(programs, report):
    command, figures, read = drawing(programs)
    reader = Reader(text := report(Section("p2-truth", [], [command], figures, read)))
    assert is_self_contained(text)
    assert ("What it shows.", (programs / "figure.png").read_bytes()) in reader.images
    assert reader.cells[:4] == ["00.png", "0.1250", "mean", "0.1250"]
    assert any(f"python {programs / 'draw.py'} {programs / 'figure.png'}" in words for words in reader.words)
    assert any("seed 7" in words for words in reader.words)
    assert f"Read from {programs / 'numbers.json'}" in reader.words
    assert TEXTS["p2-truth"].title in reader.words


def test_a_shared_command_runs_once(programs, report):
    command, figures, read = drawing(programs)
    report(Section("p2-truth", [], [command], figures, read), Section("p2-eta", [], [command], figures))
    assert (programs / "log").read_text() == "drawn\n"


def test_what_is_missing_is_said_and_the_rest_is_drawn(programs, report, capsys):
    command, figures, read = drawing(programs)
    needs = [Need(programs / name, f"train {name}") for name in ("draw.py", "a.pt", "b.pt")]
    text = report(Section("p2-eta", needs, [command], figures), Section("p2-truth", [], [command], figures, read))
    reader = Reader(text)
    told = [f"{programs / name} is not there; to get it, train {name}." for name in ("a.pt", "b.pt")]
    assert f"Not drawn. {' '.join(told)}" in reader.words
    assert [alternative for alternative, _ in reader.images].count("What it shows.") == 1
    assert f"1 of 2 sections, without: {TEXTS['p2-eta'].title}" in capsys.readouterr().out


def test_a_failing_command_is_told_after_the_page_is_written(programs, report):
    command, figures, read = drawing(programs)
    failing = Command([programs / "fail.py"], [])
    with pytest.raises(UserError, match=r"fail.py: a <b> & c; the rest is in .*index.html"):
        report(Section("p2-eta", [], [failing], figures), Section("p2-truth", [], [command], figures, read))
    text = (programs / "out" / "index.html").read_text(encoding="utf-8")
    assert any(words.endswith("fail.py: a <b> & c") for words in Reader(text).words)
    assert ("What it shows.", (programs / "figure.png").read_bytes()) in Reader(text).images


def test_an_earlier_figure_does_not_pass_for_a_new_one(programs, report):
    stale = programs / "stale.png"
    Image.new("RGB", (1, 1)).save(stale)
    idle = programs / "idle.py"
    idle.write_text("")
    with pytest.raises(UserError, match=r"idle.py: did not write .*stale.png"):
        report(Section("p2-eta", [], [Command([idle], [stale])], [Figure(stale, "old")]))
    assert not stale.exists()


def test_a_named_file_that_is_not_there_stops_before_anything_is_written(tmp_path):
    flags = ["--p1-weights", str(tmp_path / "mine.safetensors"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"--p1-weights .*mine.safetensors: no such file"):
        make.main(make.parse_arguments(flags))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--seed -1"):
        make.main(make.parse_arguments(["--seed", "-1"]))


def test_texts_that_look_like_html_are_shown_as_they_are():
    text = page("a < b", [], Table("<i>", ["&"], [["<script>"]], "<x>"), [])
    assert is_self_contained(text)
    assert {"a < b", "<i>", "&", "<script>", "Read from <x>"} <= set(Reader(text).words)


class TestSections:
    @pytest.fixture
    def all_sections(self, tmp_path):
        args = make.parse_arguments(["--out", str(tmp_path)])
        return [section for make_some in sections.SECTIONS.values() for section in make_some(args)]

    def test_every_section_has_its_words(self, all_sections):
        assert [section.key for section in all_sections] == list(TEXTS)

    def test_equations_are_drawn(self):
        drawn = [equation(tex) for text in TEXTS.values() for tex in text.equations]
        assert all('src="data:image/svg+xml;base64,' in image for image in drawn)
        assert len(set(drawn)) == len(drawn)

    def test_the_programs_take_the_arguments(self, all_sections):
        for section in all_sections:
            for command in section.commands:
                words = make.Runner.words(command)
                assert (tables.ROOT / words[0]).is_file(), section.key
                program = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
                program.parse_arguments(list(words[1:]))

    def test_named_functions_are_there(self):
        """What a section says of the code: `name in file.py`."""
        found = 0
        for text in TEXTS.values():
            for names, file in re.findall(r"([\w., ]+?) in (\w+/\w+\.py)", text.source):
                code = (tables.ROOT / file).read_text()
                for name in re.findall(r"[A-Za-z]\w+", names.rpartition(". ")[2].replace(" and ", " ")):
                    assert re.search(rf"(def|class) {name}\b", code), (name, file)
                    found += 1
        assert found > 10

    def test_the_students_weights_go_to_every_command(self, tmp_path):
        mine = tmp_path / "mine.safetensors"
        args = make.parse_arguments(["--p1-weights", str(mine), "--seed", "3"])
        for section in sections.digits(args):
            assert section.needs[0].path == mine
            drawing = [c for c in section.commands if "evaluate" not in str(c.words[0])]
            assert drawing
            assert all(mine in c.words and 3 in c.words for c in drawing)


class TestTables:
    def test_digits(self, tmp_path):
        domain = {"images": 250, "accuracy": 0.996, "judge_held_out_accuracy": 0.5, "frechet": 1.23456, "recall": 0.25}
        result = {"layout": "2025", "score": 0.9, "mnistm": domain | {"yardstick": {"recall": 1.0}}, "svhn": domain}
        (tmp_path / "a.jsonl").write_text(json.dumps({"score": 0}) + "\n" + json.dumps(result) + "\n")
        [table] = tables.digits_now(tmp_path / "a.jsonl")
        assert table.caption == "The 500 graded images, layout 2025"
        assert table.rows[0] == ["MNIST-M", "99.60 %", "1.235", "-", "0.250"]
        assert table.rows[2] == ["mean", "90.00 %", "-", "-", "-"]
        assert table.rows[3] == ["MNIST-M, training images", "-", "-", "-", "1.000"]
        assert table.rows[5] == ["SVHN, held-out images", "50.00 %", "-", "-", "-"]
        assert all(len(row) == len(table.head) for row in table.rows)

    def test_recorded_figures_come_from_the_weights(self, tmp_path, tiny_digit_weights):
        assert tables.digits_recorded(tiny_digit_weights, "2024") == []
        state, about = load_tensors(tiny_digit_weights)
        domain = {"accuracy": 0.5, "frechet": 2.0}
        figures = {"mnistm": domain, "svhn": domain, "score": 0.5, "seeds": [1, 2], "sampler": "ddim", "steps": 3}
        save_tensors(
            path := tmp_path / "w.safetensors", state, about | {"figures": {"2024": figures | {"guidance_scale": 4.0}}}
        )
        [table] = tables.digits_recorded(path, "2024")
        assert table.caption == "Mean of seeds 1 2; 3 steps of ddim, guidance 4"
        assert table.rows[1] == ["SVHN", "50.00 %", "2.000", "-", "-"]
        assert tables.digits_recorded(path, "2025") == []
        assert tables.digits_recorded(tmp_path / "UNet.pt", "2024") == []

    def test_circles(self, tmp_path):
        disc = {"iou": 0.5, "named": "gold", "nearest": "crimson", "difference": 12.34, "name_right": False}
        unknown = {"iou": None, "named": None, "nearest": "navy", "difference": None, "name_right": None}
        images = [
            {"prompt": "one", "discs": [disc], "background": unknown},
            {"prompt": "two", "discs": [disc, disc], "background": unknown},
        ]
        summary = {"images": 2, "iou": 0.5, "disc_right": 0.25, "colours_right": None}
        (tmp_path / "a.json").write_text(json.dumps({"summary": summary, "images": images}))
        [areas] = tables.several_circles(tmp_path / "a.json")
        assert [row[0].strip() for row in areas.rows] == ["two", "disc 1", "disc 2", "background"]
        assert areas.rows[1][1:] == ["0.500", "gold", "crimson", "12.3"]
        assert areas.rows[3][1:] == ["-", "-", "navy", "-"]
        [overall] = tables.circle_summary(tmp_path / "a.json")
        assert [row[1] for row in overall.rows] == ["0.500", "25.00 %", "-"]

    def test_personalization(self, tmp_path):
        (tmp_path / "z.json").write_text(
            json.dumps({"top1": 0.5, "top5": 1, "confusion": [[2, 1], [0, 3]], "clip": "c"})
        )
        [zero] = tables.zero_shot(tmp_path / "z.json")
        assert [row[1] for row in zero.rows][:4] == ["50.00 %", "100.00 %", "2", "6"]
        row = {"prompt": "p", "image": 80.0, "text": 30.5}
        rows = [row | {"baseline": [79, 34], "passed": False, "near": 0.9}, row]
        (tmp_path / "w.json").write_text(json.dumps(rows))
        [words] = tables.learned_words(tmp_path / "w.json")
        assert words.rows == [["p", "80.00", "30.50", "79, 34", "no", "90 %"], ["p", "80.00", "30.50", "-", "-", "-"]]
        both = {"prompt": "p", "count": 50, "seed": 0, "textual inversion": 0.1, "Custom Diffusion": 0.84}
        (tmp_path / "b.json").write_text(json.dumps(both))
        [two] = tables.two_concepts(tmp_path / "b.json")
        assert two.rows == [["textual inversion", "10 %"], ["Custom Diffusion", "84 %"]]
        (tmp_path / "b.json").write_text(json.dumps({"prompt": "p", "count": 50, "seed": 0}))
        assert tables.two_concepts(tmp_path / "b.json") == []


def test_make_hands_on_every_name(tmp_path):
    """`make report` with a stand-in for Python that prints its arguments, in a folder whose name has spaces."""
    clone = tmp_path / "a clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    for folder in (clone, clone / ".venv"):
        (folder / "requirements.txt").write_text("one==1\n")
    shutil.copy(tables.ROOT / "Makefile", clone)
    python = clone / ".venv" / "bin" / "python"
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    names = [name for name in vars(make.parse_arguments([])) if name.startswith("p")]
    given = {name: f"my {name}" for name in names}
    variables = [f"{name.upper()}={value}" for name, value in given.items()]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "PYTHON"}
    for chosen, expected in ((variables, given), ([], {})):
        command = ["make", "--silent", "-C", str(clone), "report", *chosen]
        told = subprocess.run(command, env=outer, capture_output=True, text=True, check=True).stdout.splitlines()
        assert told[0] == "docs/report/make.py"
        args = make.parse_arguments(told[1:])
        assert {name: str(getattr(args, name)) for name in expected} == expected
        assert len(told) == 1 + 2 * len(expected)


@pytest.mark.slow
def test_a_students_weights_give_their_own_report(tmp_path, tiny_digit_weights, digits, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--only", "p1", "--p1-weights", str(tiny_digit_weights), "--p1-data", str(digits), "--out", str(tmp_path)]
    path = make.main(make.parse_arguments(flags))
    text = path.read_text(encoding="utf-8")
    assert is_self_contained(text)
    shown = {content for _, content in Reader(text).images}
    for name in ("grid_2025", "grid_2024_mnistm", "grid_2024_svhn", "reverse_process", "guidance"):
        assert (tmp_path / "p1_figures" / f"{name}.png").read_bytes() in shown
    measured = json.loads((tmp_path / "p1_2025.jsonl").read_text())
    assert tables.percent(measured["score"]) in Reader(text).cells

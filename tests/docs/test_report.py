"""The report shows what its commands made and wrote, holds all of it in one file, and says what is missing."""

import base64
import importlib
import json
import re
from html.parser import HTMLParser
from itertools import chain

import pytest
from PIL import Image

from common.cli import UserError
from docs.report import make

TEMPLATE = (make.ROOT / "docs" / "report" / "template.html").read_text(encoding="utf-8")
FLAGS = [name for name in vars(make.parse_arguments([])) if name[0] == "p"]
DOMAIN = {"accuracy": {"mean": 0.996, "standard_error": 0.001}, "recall": {"mean": 0.5, "standard_error": None}}
REAL = {"held_out_images": {"accuracy": 0.5}, "training_images": {"recall": 0.25}}
DIGITS = {
    "sets": [{"mnistm": {"images": 250}}] * 2,
    "mean": {"score": {"mean": 0.9, "standard_error": None}, "mnistm": DOMAIN, "svhn": DOMAIN},
    "yardsticks": {"mnistm": REAL, "svhn": REAL},
}
DISC = {"iou": 0.5, "named": "gold", "nearest": "crimson", "difference": 12.34}
UNNAMED = {"iou": None, "named": None, "nearest": "navy", "difference": None}
CIRCLES = [{"prompt": f"{n} discs", "discs": [DISC] * n, "background": UNNAMED} for n in (1, 2)]
WORD = {"prompt": "a", "image": 80.0, "text": 30.5}
MEASURED = {
    "p1_2025": DIGITS,
    "p1_2024": DIGITS,
    "p2": {"00.png": 1.0, "mean": 1.0},
    "p2_quality": {"count": 4, "drawn": {"frechet": 5.04, "precision": 0.25}, "training": {"frechet": 1}},
    "p3": {"summary": {"images": 2, "iou": 0.5, "disc_right": 0.25, "colours_right": None}, "images": CIRCLES},
    "p3_one": {"summary": {"images": 200, "iou": 0.75}},
    "p3_two": {"summary": {"images": 200}},
    "p3_zeroshot": {"top1": 0.5, "top5": 1.0, "pictures": 6, "classes": 2},
    "p3_2024": [WORD, WORD | {"baseline": [79, 34], "passed": False, "near": 0.9}],
}


class Reader(HTMLParser):
    """Collects a page's pictures, the cells of its tables and its text; the page must not fetch anything."""

    def __init__(self, file):
        super().__init__()
        self.pictures, self.rows, self.words = [], [], []
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"url\(|@import", text.partition("</style>")[0])
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        addresses = {value for name, value in attributes if name in ("src", "href", "srcset", "poster")}
        assert all(address.startswith(("data:", "#")) for address in addresses)
        self.pictures += [base64.b64decode(address.partition(",")[2]) for address in addresses]
        self.rows += [[]] * (tag == "tr")

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())
            if self.lasttag == "td":
                self.rows[-1] = [*self.rows[-1], data]


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A function that makes a report of pictures and results that are already there, in place of the programs."""
    out = tmp_path / "out"
    files = {out / file: k for k, file in enumerate(re.findall(r'figure\("([^"]+)"', TEMPLATE))}
    for file, level in (files | {out / "p2" / "00.png": 11, tmp_path / "GT" / "00.png": 10}).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (level, level, level)).save(file)
    for name, result in MEASURED.items():
        (out / f"{name}.json").write_text(json.dumps(result))

    def make_report(*flags, results=out, failing=""):
        def call(commands):
            failure = "a <b>" if commands[0][0] == failing else ""
            return make.Outcome([(" ".join(words), 1.0) for words in commands], failure)

        monkeypatch.setattr(make, "call", call)
        monkeypatch.setattr(make, "RESULTS", results)
        make.main(make.parse_arguments(["--out", str(out), "--seed", "7", "--p2-examples", str(tmp_path), *flags]))
        return Reader(out / "index.html")

    return make_report


def test_the_page_holds_every_picture_and_result(report, tmp_path):
    page = report()
    for row in (
        ["MNIST-M, drawn images", "99.60 ± 0.10 %", "-", "-", "0.500"],
        ["SVHN, real held-out images", "50.00 %", "-", "-", "-"],
        ["SVHN, real training images", "-", "-", "-", "0.250"],
        ["1.0000", "1.0000"],
        ["drawn faces", "5.0", "0.250", "-"],
        ["0.500", "-", "25.0 %", "-", "-", "-", "-"],
        ["0.750", "-", "-", "-", "-", "-", "-"],
        ["disc 2", "0.500", "gold", "crimson", "12.3"],
        ["background", "-", "-", "navy", "-"],
        ["6", "2", "50.00 %", "100.00 %"],
        ["a", "80.0", "30.5", "79, 34", "no", "90 %"],
    ):
        assert row in page.rows
    assert all(file.read_bytes() in page.pictures for file in (tmp_path / "out").glob("p*_*/*"))
    assert not [words for words in page.words if words.startswith("Not ")]
    assert any("p1_ddpm/figures.py" in words and "--seed 7" in words for words in page.words)
    with Image.open(tmp_path / "out" / "p2_truth.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
    assert {(10, 10, 10), (11, 11, 11), (make.CONTRAST,) * 3} <= colours


def test_what_is_missing_is_said(report, tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    with pytest.raises(UserError, match=r"a <b>; the rest is in .*index.html"):
        report("--only", "p1", "p2", results=results, failing="p2_ddim/figures.py")
    page = Reader(out / "index.html")
    missing = [f"Not measured: {results / name}.json is not there." for name in ("p1_2025", "p1_2024", "p2_quality")]
    told = [words for words in page.words if words.startswith("Not ")]
    assert told == [*missing[:2], "Not made. a <b>", missing[2]]
    assert (out / "p2_figures" / "eta.png").read_bytes() not in page.pictures
    assert (out / "p2_truth.png").read_bytes() in page.pictures


def test_commands_run_up_to_the_first_that_fails(tmp_path):
    (tmp_path / "fine.py").write_text("")
    (tmp_path / "fail.py").write_text("import sys\nprint('first\\nlast', file=sys.stderr)\nsys.exit(2)\n")
    fine, fail = [str(tmp_path / "fine.py")], [str(tmp_path / "fail.py"), "a b"]
    outcome = make.call([fine, fail, fine])
    assert [line for line, _ in outcome.commands] == [f"python {fine[0]}", f"python {fail[0]} 'a b'"]
    assert outcome.failure == f"{fail[0]}: last"


@pytest.mark.parametrize("own", [False, True])
def test_the_programs_take_their_arguments(own, tmp_path):
    given = {name: str(tmp_path / f"my {name}") for name in FLAGS} if own else {}
    flags = chain(*((f"--{name.replace('_', '-')}", path) for name, path in given.items()))
    plan = make.plan_commands(make.parse_arguments(["--out", str(tmp_path), *flags]))
    assert set(make.JUDGED) & set(plan) == (set(make.JUDGED) if own else set())
    for words in chain(*plan.values()):
        importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).parse_arguments(words[1:])
    assert all(path in str(plan) for path in given.values())


def test_a_named_file_that_is_not_there_stops_before_anything_is_written(tmp_path):
    for flags in (["--p1-weights", str(tmp_path / "mine")], ["--seed", "-1"]):
        with pytest.raises(UserError, match=" ".join(flags)):
            make.main(make.parse_arguments([*flags, "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_students_weights_give_their_own_report(tmp_path, tiny_digit_weights, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--only", "p1", "--p1-weights", str(tiny_digit_weights), "--out", str(tmp_path)]
    page = Reader(make.main(make.parse_arguments(flags)))
    score = json.loads((tmp_path / "p1_2025.json").read_text())["mean"]["score"]
    assert ["drawn images, mean of both", make.percent(score), "-", "-", "-"] in page.rows
    assert (tmp_path / "p1_figures" / "grid_2025.png").read_bytes() in page.pictures

"""Every number in the README's results table, and in tables of docs/results.md, stands in docs/results/*.json."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A row's first cell | where its figures lie, a file first | which, in their order; published ones are left out.
SOURCES = """
P1, 2024 layout: mean accuracy | p1_2024 | mean.score.mean mean.score.standard_error sets.# settings.count
P1, 2024 layout: MNIST-M; SVHN | p1_2024.mean.mnistm.accuracy p1_2024.mean.svhn.accuracy | mean standard_error
P1, 2025 layout: mean accuracy | p1_2025 | mean.score.mean mean.score.standard_error sets.# settings.count
P1, 2025 layout: the default seed | p1_2025 | sets.0.score settings.seeds.0 settings.count
P2: mean squared error to the ground truth, 0-255 | p2_mse | mean
P2: Frechet distance of random faces; of real ones | p2_quality | drawn.frechet training.frechet count
P3, one circle: IoU at the centre; all colours right | p3_one.summary | iou colours_right images
P3, two circles: the same | p3_two.summary | iou colours_right images
P3 of 2024: discs in the learned colour, by prompt | p3_2024 | 0.near 1.near 2.near 3.near 0.images.#
Zero-shot CLIP, top-1 | zeroshot | top1 classes pictures
2024, 11 seeds | p1_2024.mean.mnistm.accuracy p1_2024.mean.svhn.accuracy p1_2024.mean.score | mean standard_error
2024, seed 0 | p1_2024.sets.0 | mnistm.accuracy svhn.accuracy score
2025, 11 seeds | p1_2025.mean.mnistm.accuracy p1_2025.mean.svhn.accuracy p1_2025.mean.score | mean standard_error
2025, seed 0 | p1_2025.sets.0 | mnistm.accuracy svhn.accuracy score
real held-out images | p1_2024.yardsticks | mnistm.held_out_images.accuracy svhn.held_out_images.accuracy
MNIST-M, drawn | p1_2024.mean.mnistm | frechet.mean precision.mean recall.mean
MNIST-M, training images | p1_2024.yardsticks.mnistm.training_images | frechet precision recall
SVHN, drawn | p1_2024.mean.svhn | frechet.mean precision.mean recall.mean
SVHN, training images | p1_2024.yardsticks.svhn.training_images | frechet precision recall
ten faces | p2_mse | mean
drawn faces | p2_quality.drawn | frechet kernel precision recall
training faces | p2_quality.training | frechet kernel precision recall
from drawn faces | p2_quality.nearest.drawn | median smallest
from held-out faces | p2_quality.nearest.held-out | median smallest
IoU of the area at the centre | p3_one.summary p3_two.summary | iou
IoU of the discs | p3_one.summary p3_two.summary | disc_iou
disc within CIEDE2000 10 of the named colour | p3_one.summary p3_two.summary | disc_right
background within 10 | p3_one.summary p3_two.summary | background_right
all colours within 10 | p3_one.summary p3_two.summary | colours_right
(CLIP cosine + 1)/2 x IoU, ten best | p3_one.summary p3_two.summary | score_best
the same, all pictures | p3_one.summary p3_two.summary | score_all
with discs that the border cuts | p3_one.cut p3_two.cut | images iou colours_right
with whole discs | p3_one.whole p3_two.whole | images iou colours_right
line of 1 pixel | p3_hints.1px.one p3_hints.1px.two | iou colours_right
line broken in places | p3_hints.broken.one p3_hints.broken.two | iou colours_right
noise of a JPEG file | p3_hints.jpeg.one p3_hints.jpeg.two | iou colours_right
file of 4:3, squeezed | p3_hints.squeezed.one p3_hints.squeezed.two | iou colours_right
inverted: black on white | p3_hints.inverted.one p3_hints.inverted.two | iou colours_right
filled discs | p3_hints.filled.one p3_hints.filled.two | iou colours_right
wine | p3_2024.0 | image baseline.0 text baseline.1 near
wine beside gold | p3_2024.1 | image baseline.0 text baseline.1 near
mustard | p3_2024.2 | image baseline.0 text baseline.1 near
mustard beside gold | p3_2024.3 | image baseline.0 text baseline.1 near
held-out circles | zeroshot | pictures classes top1 top5
"""
for n in (2, 3, 4, 5, 6, 8, 12):
    SOURCES += f"line of {n} pixels | p3_hints.{n}px.one p3_hints.{n}px.two | iou colours_right\n"
ROWS = dict(line.split(" | ", maxsplit=1) for line in SOURCES.strip().splitlines())
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")}
README_TABLE = re.search(r"\n\| what \| published \|.*?\n\n", PAGES["README.md"], re.DOTALL)[0].strip().splitlines()


def find(where: str):
    """A figure by its file and the keys in it, joined by dots; # counts."""
    name, *keys = where.split(".")
    value = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for key in keys:
        value = len(value) if key == "#" else value[int(key) if isinstance(value, list) else key]
    return value


@pytest.mark.parametrize("label", ROWS)
def test_numbers_are_the_measured_ones(label):
    places, names = (part.split() for part in ROWS[label].split(" | "))
    figures = [find(f"{place}.{name}") for place in places for name in names]
    (row,) = {line for page in PAGES.values() for line in page.splitlines() if line.startswith(f"| {label} |")}
    cells = row.strip("| ").split(" | ")[1:]
    parts = [part for cell in (cells[1:] if row in README_TABLE else cells) for part in cell.split(";")]
    shown = [(number, "%" in part) for part in parts for number in re.findall(r"\d[\d,]*(?:\.\d+)?", part)]
    assert len(shown) == len(figures)
    for (number, percent), figure in zip(shown, figures):
        digits = len(number.partition(".")[2])
        assert number.rstrip(",") == f"{figure * 100 if percent else figure:,.{digits}f}"


def test_every_row_of_the_readme_is_looked_at():
    assert {line.split(" | ")[0].strip("| ") for line in README_TABLE[2:]} <= set(ROWS)

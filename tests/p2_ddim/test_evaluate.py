"""Errors with known values, and folders that do not match."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from p2_ddim import evaluate
from tests.programs import run


def write(folder, **images):
    folder.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return str(folder)


def flat(value, size=(4, 6)):
    return np.full((*size, 3), value, dtype=np.uint8)


def test_errors_are_mean_squares_on_the_byte_scale(tmp_path, capsys):
    red = flat(10)
    red[0, 0, 0] = 22  # one of 72 values off by 12
    out = write(tmp_path / "out", a=red, b=flat(255), c=flat(7))
    truth = write(tmp_path / "GT", a=flat(10), b=flat(0), c=flat(7))
    file = tmp_path / "figures" / "errors.json"
    errors = run(evaluate, out, truth, "--json", file)
    assert errors == {"a.png": 2.0, "b.png": 65025.0, "c.png": 0.0, "mean": pytest.approx(65027 / 3)}
    assert json.loads(file.read_text()) == errors
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [["a.png", "2.0000"], ["b.png", "65025.0000"], ["c.png", "0.0000"], ["mean", "21675.6667"]]


MISTAKES = {
    "missing image": (lambda out, truth: (out / "b.png").unlink(), ["out: has no b, which"]),
    "further image": (lambda out, truth: write(out, c=flat(0)), ["GT: has no c, which"]),
    "other size": (lambda out, truth: write(out, b=flat(0, (6, 4))), ["out/b.png", "4x6", "6x4"]),
    "broken image": (lambda out, truth: (out / "b.png").write_bytes(b"no"), ["out/b.png", "not a readable image"]),
    "one name twice": (
        lambda out, truth: shutil.copy(out / "a.png", out / "a.bmp"),
        ["a.bmp", "has that name too"],
    ),
    "empty folder": (lambda out, truth: [path.unlink() for path in truth.iterdir()], ["GT: holds no images"]),
    "no folder": (lambda out, truth: truth.rename(truth.with_name("other")), ["GT: no such folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_folders_that_do_not_match(mistake, tmp_path, refusal):
    folders = [write(tmp_path / name, a=flat(1), b=flat(2)) for name in ("out", "GT")]
    spoil, words = MISTAKES[mistake]
    spoil(*map(Path, folders))
    line = refusal(evaluate.main, evaluate.parse_arguments(folders))
    assert all(word in line for word in words), line

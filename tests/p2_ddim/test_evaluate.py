"""Errors with known values, and folders that do not match."""

import json

import numpy as np
import pytest
from PIL import Image

from common.cli import run
from p2_ddim import evaluate


def write(folder, **images):
    folder.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def flat(value, size=(4, 6)):
    return np.full((*size, 3), value, dtype=np.uint8)


def evaluated(out, truth):
    return evaluate.main(evaluate.parse_arguments([str(out), str(truth)]))


def test_errors_are_mean_squares_on_the_byte_scale(tmp_path, capsys):
    one = flat(10)
    one[0, 0, 0] = 22  # one of 72 values off by 12
    errors = evaluated(
        write(tmp_path / "out", a=one, b=flat(255), c=flat(7)), write(tmp_path / "GT", a=flat(10), b=flat(0), c=flat(7))
    )
    assert errors == {"a.png": 2.0, "b.png": 65025.0, "c.png": 0.0, "mean": pytest.approx(65027 / 3)}
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [["a.png", "2.0000"], ["b.png", "65025.0000"], ["c.png", "0.0000"], ["mean", "21675.6667"]]


def test_errors_are_written_as_json(tmp_path):
    out, truth = write(tmp_path / "out", a=flat(1), b=flat(5)), write(tmp_path / "GT", a=flat(2), b=flat(2))
    file = tmp_path / "figures" / "errors.json"
    errors = evaluate.main(evaluate.parse_arguments([str(out), str(truth), "--json", str(file)]))
    assert json.loads(file.read_text()) == errors == {"a.png": 1.0, "b.png": 9.0, "mean": 5.0}


def test_colours_count_apart(tmp_path):
    red, blue = (np.zeros((2, 2, 3), np.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 30, 30
    assert evaluated(write(tmp_path / "out", a=red), write(tmp_path / "GT", a=blue))["mean"] == pytest.approx(600)


def missing_image(out, truth):
    (out / "b.png").unlink()


def further_image(out, truth):
    write(out, c=flat(0))


def other_size(out, truth):
    write(out, b=flat(0, (6, 4)))


def broken_image(out, truth):
    (out / "b.png").write_bytes(b"no image")


def empty_folder(out, truth):
    for path in truth.iterdir():
        path.unlink()


def no_folder(out, truth):
    empty_folder(out, truth)
    truth.rmdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing_image, ["out: has no b.png"]),
        (further_image, ["GT: has no c.png"]),
        (other_size, ["out/b.png", "4x6", "6x4"]),
        (broken_image, ["out/b.png", "not a readable image"]),
        (empty_folder, ["GT: holds no PNG"]),
        (no_folder, ["GT: no such folder"]),
    ],
)
def test_folders_that_do_not_match(spoil, words, tmp_path, capsys):
    out, truth = (write(tmp_path / name, a=flat(1), b=flat(2)) for name in ("out", "GT"))
    spoil(out, truth)
    with pytest.raises(SystemExit) as caught:
        run(evaluate.main, evaluate.parse_arguments([str(out), str(truth)]))
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert all(word in printed.err for word in words), printed.err

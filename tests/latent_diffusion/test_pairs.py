"""Tables of hints, prompts and targets, and the images that they name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from latent_diffusion.pairs import Pair, read_hints, read_pairs, readable_pairs

LINE = {"source": "0.png", "target": "0.png", "prompt": "red circle with blue background"}


def table(folder, *lines):
    path = folder / "prompt.json"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def refused(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def flat(path, grey, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, 7)).save(path)


def pair(source, target="0.png"):
    return Pair(source, target, "", "prompt.json line 9")


def test_lines_keep_their_order_and_numbers(tmp_path):
    """With a byte order mark, carriage returns, blank lines, and line ends that JSON may hold."""
    other = {"source": "source/1.png", "target": "a/1.png", "more": 3, "prompt": "π\u2028\u0085"}
    lines = ["\ufeff", json.dumps(LINE), " ", json.dumps(other, ensure_ascii=False), ""]
    (path := tmp_path / "prompt.json").write_bytes("\r\n".join(lines).encode())
    assert read_pairs(path) == [
        Pair("0.png", "0.png", LINE["prompt"], f"{path} line 2"),
        Pair("source/1.png", "a/1.png", "π\u2028\u0085", f"{path} line 4"),
    ]


def without(name):
    return {key: value for key, value in LINE.items() if key != name}


BAD_LINES = [
    ("{'source': 0}", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("9" * 10_000, "not JSON"),
    ([LINE], "not an object but list"),
    (without("target"), 'no "target"'),
    (LINE | {"prompt": None}, '"prompt" is null, not a string'),
    (LINE | {"prompt": "red \ud800 circle"}, "half of a character"),
    (LINE | {"source": ""}, "no file name"),
    (LINE | {"source": "0\0.png"}, "no file name"),
    (LINE | {"target": "."}, "no file name"),
    (LINE | {"target": "../0.png"}, "leaves the output folder"),
    (LINE | {"target": "a/../../0.png"}, "leaves the output folder"),
    (LINE | {"target": "/tmp/0.png"}, "leaves the output folder"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_bad_lines_are_named_with_their_number(line, words, tmp_path, capsys):
    path = table(tmp_path, LINE, "", line, LINE | {"prompt": "last"})
    complaint = refused(read_pairs, path)
    assert complaint.startswith(f"{path} line 3: ")
    assert words in complaint
    assert capsys.readouterr().err == ""
    assert [p.prompt for p in read_pairs(path, keep_going=True)] == [LINE["prompt"], "last"]
    assert capsys.readouterr().err == f"skipped: {complaint}\n"


def test_keeping_going_needs_something_left(tmp_path, capsys):
    path = table(tmp_path, without("source"), without("prompt"))
    assert f'nothing is left: {path} line 2: has no "prompt"' in refused(read_pairs, path, keep_going=True)
    assert capsys.readouterr().err.count("skipped: ") == 2


def test_tables_that_are_no_text(tmp_path):
    assert "no such file" in refused(read_pairs, tmp_path / "absent.json")
    assert "cannot be read" in refused(read_pairs, tmp_path)
    empty, binary = tmp_path / "empty.json", tmp_path / "binary.json"
    empty.write_text("\ufeff \n\n")
    binary.write_bytes(b"\x89PNG\xff")
    assert f"{empty}: is empty" in refused(read_pairs, empty)
    assert f"{binary}: not UTF-8 text" in refused(read_pairs, binary)


def test_one_target_twice(tmp_path):
    path = table(tmp_path, LINE, LINE | {"target": "1.png"}, LINE | {"target": "./0.png"})
    assert len(read_pairs(path)) == 3
    complaint = refused(read_pairs, path, distinct_targets=True)
    assert complaint.startswith(f"{path} line 3: ")
    assert f"{path} line 1" in complaint


@pytest.mark.parametrize(
    ("name", "folder"),
    [("0.png", "data/source"), *(("source/0.png", folder) for folder in ("data", "data/source", "data/target"))],
)
def test_hints_and_targets_are_found_by_training_and_testing_names(name, folder, tmp_path):
    flat(tmp_path / "data" / "source" / "0.png", 200)
    flat(tmp_path / "data" / "target" / "0.png", 100)
    own = [pair(name, "target/0.png")]
    assert read_hints(own, tmp_path / folder, 4)[0, :, 2, 1].tolist() == [200, 200, 7]
    assert read_hints(own, tmp_path / folder, 4, field="target")[0, :, 2, 1].tolist() == [100, 100, 7]


def test_hints_keep_the_order_of_their_lines_and_get_one_size(tmp_path):
    for i in range(20):
        flat(tmp_path / f"{i}.png", 10 * i, size=(4 + i, 9))
    hints = read_hints([pair(f"{i}.png") for i in reversed(range(20))], tmp_path, 6)
    assert hints.shape == (20, 3, 6, 6)
    np.testing.assert_array_equal(hints[:, 0, 3, 3], 10 * np.arange(19, -1, -1))


@pytest.mark.parametrize("spoil", [lambda path: None, lambda path: path.write_bytes(b"no image"), Path.mkdir])
def test_bad_hints_are_named_with_their_line(spoil, tmp_path, capsys):
    flat(tmp_path / "0.png", 1)
    spoil(tmp_path / "1.png")
    pairs = [pair("0.png"), Pair("1.png", "1.png", "", "prompt.json line 12")]
    complaint = refused(read_hints, pairs, tmp_path, 4)
    assert complaint.startswith(f"prompt.json line 12: {tmp_path / '1.png'}: ")
    assert refused(readable_pairs, pairs, tmp_path, keep_going=False) == complaint
    assert readable_pairs(pairs, tmp_path, keep_going=True) == pairs[:1]
    assert capsys.readouterr().err == f"skipped: {complaint}\n"

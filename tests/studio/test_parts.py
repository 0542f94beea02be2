"""Values of the page are checked, weights are read again when they change, and what comes from outside is no markup."""

import base64
import io
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from studio.parts import Control, Kept, complaint, figure, line, notice
from tests.programs import read

NASTY = '<img src=x onerror="alert(1)">'


@pytest.mark.parametrize("value", [None, "7", math.nan, math.inf, -0.1, 10.1])
def test_numbers_in_range_only(value):
    guidance = Control("guidance", 2, 0, 10, step=0.5)
    with pytest.raises(UserError, match=r"^guidance .* choose from 0 to 10$"):
        guidance.check(value)
    assert guidance.check(10) == 10.0


def test_whole_numbers_choices_and_texts():
    assert Control("seed", 0, 0, 9).check(3.0) == 3
    with pytest.raises(UserError, match=r"^seed 3\.5: choose a whole number$"):
        Control("seed", 0, 0, 9).check(3.5)
    sampler = Control("sampler", "ddim", options=("ddpm", "ddim"))
    assert sampler.check("ddpm") == "ddpm"
    with pytest.raises(UserError, match=r"^sampler is empty: choose ddpm, ddim$"):
        sampler.check(None)
    assert [Control("prompt", "").check(text) for text in (None, " 🟡\n🟣 ")] == ["", "🟡 🟣"]


def test_files_and_folders_that_change_are_read_again(tmp_path):
    file, folder, calls = tmp_path / "weights", tmp_path / "deep", []
    (folder / "er").mkdir(parents=True)

    def read(*paths):
        calls.append(paths)
        return file.read_text(), sorted(path.name for path in folder.rglob("*"))

    kept = Kept(read)
    with pytest.raises(FileNotFoundError):
        kept(file, folder)
    file.write_text("one")
    assert kept(file, folder) == kept(file, folder) == ("one", ["er"])
    assert calls == [(file, folder)] * 2
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert kept(file, folder) == ("two", ["er"])
    (folder / "er" / "file").touch()
    assert kept(file, folder) == ("two", ["er", "file"])


def test_no_two_read_at_once(tmp_path):
    reading, most = [], []

    def read(path):
        reading.append(path)
        most.append(len(reading))
        time.sleep(0.05)
        reading.remove(path)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda kept: kept(tmp_path), [Kept(read) for _ in range(3)]))
    assert most == [1, 1, 1]


def test_text_is_escaped_and_a_figure_carries_its_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    shown = figure(NASTY, Image.fromarray(pixels))
    for markup in (shown, figure(NASTY), line(NASTY), complaint(NASTY), notice(NASTY)):
        assert NASTY not in markup
        assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in markup
    data = re.search(r'src="data:image/png;base64,([^"]+)"', shown)[1]
    assert np.array_equal(read(io.BytesIO(base64.b64decode(data))), pixels)
    assert "<img" not in figure("nothing yet")
    assert notice("") == ""

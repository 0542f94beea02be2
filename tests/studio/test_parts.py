"""Values of the page are checked, and weights are read again when they change."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.cli import UserError
from studio.parts import Kept, choice, number, whole


@pytest.mark.parametrize("value", [None, "7", math.nan, math.inf, -0.1, 10.1])
def test_numbers_in_range_only(value):
    with pytest.raises(UserError, match=r"^guidance .* choose from 0 to 10$"):
        number("guidance", value, 0, 10)
    assert number("guidance", 10, 0, 10) == 10.0


def test_whole_numbers():
    assert whole("seed", 3.0, 0, 9) == 3
    with pytest.raises(UserError, match=r"^seed 3\.5: choose a whole number$"):
        whole("seed", 3.5, 0, 9)


def test_choices():
    assert choice("sampler", "ddim", ("ddpm", "ddim")) == "ddim"
    with pytest.raises(UserError, match=r"^sampler is empty: choose ddpm, ddim$"):
        choice("sampler", None, ("ddpm", "ddim"))


class TestKept:
    def test_a_file_that_changes_is_read_again(self, tmp_path):
        file, calls = tmp_path / "weights", []
        kept = Kept(lambda path: calls.append(path) or path.read_text())
        file.write_text("one")
        assert [kept(file), kept(file)] == ["one", "one"]
        assert len(calls) == 1
        file.write_text("two")
        os.utime(file, ns=(1, 1))
        assert kept(file) == "two"

    def test_a_folder_and_other_files(self, tmp_path):
        (tmp_path / "deep" / "er").mkdir(parents=True)
        kept = Kept(lambda path, *more: sorted(file.name for file in path.rglob("*")) + [file.name for file in more])
        assert kept(tmp_path / "deep") == ["er"]
        (tmp_path / "deep" / "er" / "file").touch()
        assert kept(tmp_path / "deep") == ["er", "file"]
        assert kept(tmp_path / "deep", tmp_path / "not there") == ["er", "file", "not there"]

    def test_no_two_read_at_once(self, tmp_path):
        reading, most = [], []

        def read(path):
            reading.append(path)
            most.append(len(reading))
            time.sleep(0.05)
            reading.remove(path)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda kept: kept(tmp_path), [Kept(read) for _ in range(3)]))
        assert most == [1, 1, 1]

    def test_what_failed_is_tried_again(self, tmp_path):
        file = tmp_path / "weights"
        kept = Kept(lambda path: path.read_text())
        with pytest.raises(FileNotFoundError):
            kept(file)
        file.write_text("here")
        assert kept(file) == "here"

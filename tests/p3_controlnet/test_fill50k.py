"""The folder that fill50k.py writes, and the shipped examples, which it made."""

import numpy as np
import pytest

from latent_diffusion.miniature.scenes import held_out, read_prompt
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet import fill50k
from p3_controlnet.sample import EXAMPLES
from tests.programs import parse, read, run


def test_lines_of_one_width_and_rough_ones(tmp_path):
    flags = "--count", "6", "--size", "64"
    hints = {}
    for name, more in {"plain": (), "wide": ("--line-width", "12"), "broken": ("--rough", "broken")}.items():
        table = run(fill50k, tmp_path / name, *flags, *more)
        hints[name] = read_hints(read_pairs(table), tmp_path / name, 64).int()
    assert table.read_text() == (tmp_path / "plain" / "prompt.json").read_text()
    assert (hints["wide"].sum(dim=(1, 2, 3)) > 1.3 * hints["plain"].sum(dim=(1, 2, 3))).all()
    assert hints["broken"].sum() < hints["plain"].sum()
    for target in (tmp_path / "plain" / "target").iterdir():
        assert target.read_bytes() == (tmp_path / "broken" / "target" / target.name).read_bytes()


def test_shipped_examples_are_what_it_makes(tmp_path):
    """Single circles of held-out colours, and one hint of two circles with two prompts."""
    (flags,) = (line for line in fill50k.__doc__.splitlines() if "--report" in line)
    run(fill50k, tmp_path, *flags.partition("#")[0].split()[3:])
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".png":
            assert np.abs(read(tmp_path / file) - read(EXAMPLES / file)).max() <= 1, file
    assert (tmp_path / "prompt.json").read_text() == (EXAMPLES / "prompt.json").read_text()
    *singles, gray, colours = read_pairs(EXAMPLES / "prompt.json", distinct_targets=True)
    assert len(singles) == 20
    assert all(held_out(names[0], background) for names, background in (read_prompt(p.prompt) for p in singles))
    assert gray.source == colours.source == fill50k.REPORT_HINT
    assert [len(read_prompt(pair.prompt)[0]) for pair in (gray, colours)] == [1, 2]


@pytest.mark.parametrize("flags", [["--count", "0"], ["--size", "31"], ["--seed", "-1"], ["--line-width", "0"]])
def test_bad_arguments_leave_nothing_behind(flags, tmp_path, refusal):
    line = refusal(fill50k.main, parse(fill50k, tmp_path / "out", "--count", "2", *flags))
    assert flags[1] in line
    assert not list(tmp_path.rglob("*.*"))

"""The folder that fill50k.py writes."""

import json

import numpy as np
import pytest

from common.cli import run
from latent_diffusion.miniature.scenes import draw_hint, draw_target, held_out, random_scenes, read_prompt
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet import fill50k


def made(out, *flags):
    return fill50k.main(fill50k.parse_arguments([str(out), "--size", "32", *flags]))


def test_the_folder_has_the_courses_layout(tmp_path):
    table = made(tmp_path / "data", "--count", "12", "--seed", "5")
    assert table == tmp_path / "data" / "prompt.json"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    scenes = list(random_scenes(12, 32, 5, (1, 2), False))
    assert lines == [
        {"source": f"source/{k}.png", "target": f"target/{k}.png", "prompt": drawn.prompt}
        for k, drawn in enumerate(scenes)
    ]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["prompt.json", "source", "target"]
    pairs = read_pairs(table)
    for field, draw in (("source", draw_hint), ("target", draw_target)):
        images = read_hints(pairs, tmp_path / "data", 32, field=field).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(images, [draw(drawn, 32) for drawn in scenes])


@pytest.mark.parametrize("circles", [1, 2])
def test_held_out_scenes_of_one_kind(circles, tmp_path):
    table = made(tmp_path, "--count", "10", "--circles", str(circles), "--held-out")
    prompts = [json.loads(line)["prompt"] for line in table.read_text().splitlines()]
    assert prompts == [drawn.prompt for drawn in random_scenes(10, 32, 0, (circles,), True)]
    parts = [read_prompt(prompt) for prompt in prompts]
    assert all(held_out(name, background) for names, background in parts for name in names)
    assert max(len(names) for names, _ in parts) == circles


@pytest.mark.parametrize("flags", [["--count", "0"], ["--size", "31"], ["--seed", "-1"]])
def test_bad_arguments_leave_nothing_behind(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(fill50k.main, fill50k.parse_arguments([str(tmp_path / "out"), "--count", "2", *flags]))
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.rglob("*.*"))

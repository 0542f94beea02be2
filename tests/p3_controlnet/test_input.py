"""What may be handed in to sample.py: every mistake is one line on stderr, and nothing is written."""

from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from common.cli import run
from p3_controlnet import sample
from p3_controlnet.model import ControlNet, ControlNetConfig


@pytest.fixture
def call(pipeline_folder, controlnet_folder, hint_folder, tmp_path, capsys):
    """A function that runs sample.py on the hints, perhaps wrongly; returns its exit code, stderr and output folder."""

    def run_it(*flags, table="prompt.json", base=pipeline_folder, controlnet=controlnet_folder):
        out = tmp_path / "out"
        arguments = [hint_folder / table, hint_folder / "source", out, base, "--controlnet", controlnet]
        arguments += ["--steps", 1, "--precision", "fp32", *flags]
        try:
            run(sample.main, sample.parse_arguments([str(argument) for argument in arguments]))
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err, out
        return 0, capsys.readouterr().err, out

    return run_it


def refused(result, *parts):
    code, err, out = result
    assert (code, err.count("\n")) == (2, 1)
    assert not [part for part in parts if part not in err]
    assert not out.is_dir() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["line 3", "not JSON"]),
        ('{"source": "1.png", "target": "0.png", "prompt": ""}', ["line 3", "line 1", "0.png"]),
        ('{"source": "broken.png", "target": "9.png", "prompt": ""}', ["line 3", "broken.png"]),
    ],
)
def test_one_bad_line_stops_everything_unless_told_to_go_on(call, hint_folder, line, parts):
    (hint_folder / "source" / "broken.png").write_bytes(b"no image")
    good = (hint_folder / "prompt.json").read_text().splitlines()
    (hint_folder / "bad.json").write_text("\n".join([*good[:2], line, *good[2:]]))
    refused(call(table="bad.json"), "bad.json", *parts)
    code, err, out = call("--keep-going", table="bad.json")
    assert (code, err.count("\n")) == (0, 1)
    assert not [part for part in parts if part not in err]
    skipping = {path.name: np.asarray(Image.open(path)) for path in out.iterdir()}
    assert sorted(skipping) == [f"{k}.png" for k in range(5)]
    call()
    assert all(np.array_equal(Image.open(out / name), pixels) for name, pixels in skipping.items())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--steps", "1001"], "--steps 1001"),
        (["--size", "60"], "--size 60: must be divisible by 8"),
        (["--size", "0"], "--size 0"),
        (["--patch-size", "12"], "--patch-size 12"),
        (["--patch-stride", "0"], "--patch-stride 0"),
        (["--patch-size", "32", "--patch-stride", "40"], "--patch-stride 40"),
        (["--control-scale", "1", "2"], "--control-scale: 2 numbers for 1"),
        (["--control-scale", "inf"], "--control-scale inf"),
        (["--control-scales", "1", "2"], "--control-scales: 2 numbers; this ControlNet has 7"),
        (["--device", "gpu9"], "--device gpu9"),
    ],
)
def test_flags_out_of_range(call, flags, complaint):
    refused(call(*flags), complaint)


def test_bad_weights(call, tmp_path, unet, controlnet, pipeline_folder):
    refused(call(base=tmp_path / "nowhere"), "nowhere")
    refused(call(controlnet=tmp_path / "nowhere"), "nowhere")
    refused(call(controlnet=pipeline_folder), "has no config.json, but", "name a whole folder in diffusers' layout")
    ControlNet.from_unet(unet, (4, 4, 4, 4, 4)).save(tmp_path / "coarser", {})
    refused(call(controlnet=tmp_path / "coarser"), "coarser", "16 pixels a latent, the base has 8")
    ControlNet(ControlNetConfig(**asdict(controlnet.config) | {"cross_attention_dim": 24})).save(tmp_path / "other", {})
    refused(call(controlnet=tmp_path / "other"), "other", "cross_attention_dim 24, not 16")


def test_places_that_cannot_be_read_or_written(call, hint_folder, full_disk, tmp_path):
    (hint_folder / "empty.json").write_text("\n \n")
    refused(call(table="empty.json"), "empty.json: is empty")
    with full_disk(1000):
        refused(call(), str(tmp_path / "out"))
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    refused(call(), f"{tmp_path / 'out'}: is a file")
    assert (tmp_path / "out").read_text() == "in the way"

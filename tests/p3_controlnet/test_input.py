"""What may be handed in to sample.py: every mistake is one line on stderr, and nothing is written."""

from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from p3_controlnet import sample
from p3_controlnet.model import ControlNet, ControlNetConfig


@pytest.fixture
def arguments(pipeline_folder, controlnet_folder, hint_folder, tmp_path):
    """A function that makes sample.py's arguments for the hints, with further flags, perhaps wrong ones."""

    def make(*flags, table="prompt.json", base=pipeline_folder, controlnet=controlnet_folder):
        places = [hint_folder / table, hint_folder / "source", tmp_path / "out", base, "--controlnet", controlnet]
        return sample.parse_arguments([str(flag) for flag in [*places, "--steps", 1, "--precision", "fp32", *flags]])

    return make


@pytest.fixture
def refused(arguments, refusal, tmp_path):
    """A function that runs sample.py, which must say these parts on one line and write nothing."""

    def check(*parts, flags=(), **changes):
        line, out = refusal(sample.main, arguments(*flags, **changes)), tmp_path / "out"
        assert not [part for part in parts if part not in line]
        assert not out.is_dir() or not list(out.iterdir())

    return check


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["line 3", "not JSON"]),
        ('{"source": "1.png", "target": "0.png", "prompt": ""}', ["line 3", "line 1", "0.png"]),
        ('{"source": "broken.png", "target": "9.png", "prompt": ""}', ["line 3", "broken.png"]),
    ],
)
def test_one_bad_line_stops_everything_unless_told_to_go_on(arguments, refused, hint_folder, capsys, line, parts):
    (hint_folder / "source" / "broken.png").write_bytes(b"no image")
    good = (hint_folder / "prompt.json").read_text().splitlines()
    (hint_folder / "bad.json").write_text("\n".join([*good[:2], line, *good[2:]]))
    refused("bad.json", *parts, table="bad.json")
    files = sample.main(arguments("--keep-going", table="bad.json"))
    (told,) = capsys.readouterr().err.splitlines()
    assert not [part for part in parts if part not in told]
    assert [path.name for path in files] == [f"{k}.png" for k in range(5)]
    skipping = [np.asarray(Image.open(path)) for path in files]
    assert all(np.array_equal(Image.open(path), pixels) for path, pixels in zip(sample.main(arguments()), skipping))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--size", "60"], "--size 60: must be divisible by 8"),
        (["--size", "0"], "--size 0"),
        (["--patch-size", "12"], "--patch-size 12"),
        (["--patch-stride", "0"], "--patch-stride 0"),
        (["--patch-size", "32", "--patch-stride", "40"], "--patch-stride 40"),
        (["--control-scale", "1", "2"], "--control-scale: 2 numbers for 1"),
        (["--control-scale", "inf"], "--control-scale inf"),
        (["--control-scales", "1", "2"], "--control-scales: 2 numbers; this ControlNet has 7"),
    ],
)
def test_flags_out_of_range(refused, flags, complaint):
    refused(complaint, flags=flags)


def test_bad_weights(refused, tmp_path, unet, controlnet, pipeline_folder):
    refused("nowhere", controlnet=tmp_path / "nowhere")
    refused("has no config.json, but", "name a whole folder in diffusers' layout", controlnet=pipeline_folder)
    ControlNet.from_unet(unet, (4, 4, 4, 4, 4)).save(tmp_path / "coarser", {})
    refused("coarser", "16 pixels a latent, the base has 8", controlnet=tmp_path / "coarser")
    ControlNet(ControlNetConfig(**asdict(controlnet.config) | {"cross_attention_dim": 24})).save(tmp_path / "other", {})
    refused("other", "cross_attention_dim 24, not 16", controlnet=tmp_path / "other")


def test_places_that_cannot_be_read_or_written(refused, hint_folder, full_disk, tmp_path):
    (hint_folder / "empty.json").write_text("\n \n")
    refused("empty.json: is empty", table="empty.json")
    with full_disk(1000):
        refused(str(tmp_path / "out"))
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    refused(f"{tmp_path / 'out'}: is a file")
    assert (tmp_path / "out").read_text() == "in the way"

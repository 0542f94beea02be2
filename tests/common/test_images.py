"""Pixels against torchvision's rule, and pictures of every kind that people have."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import save_image

from common import cli
from common.cli import UserError
from common.images import list_images, plain_text, read_image, save_png, to_uint8


def test_rounding_is_save_images(tmp_path):
    images = torch.linspace(-1.2, 1.2, 3 * 40 * 40).reshape(1, 3, 40, 40)
    save_image((images[0] + 1) / 2, tmp_path / "theirs.png")
    save_png(tmp_path / "ours.png", to_uint8(images)[0])
    ours, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("ours", "theirs"))
    assert np.array_equal(ours, theirs)


def test_every_byte_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif"])
def test_pictures_stand_upright_whichever_way_the_camera_was_held(kind, tmp_path):
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :8], upright[8:, 16:] = (255, 0, 0), (0, 0, 255)
    # What a camera stores of it, by EXIF's orientation (Exif 2.32, section 4.6.4).
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"a.{kind}", exif=exif, quality=95)
        picture = read_image(tmp_path / f"a.{kind}", None).astype(int)
        assert picture.shape == upright.shape, orientation
        assert np.abs(picture - upright)[2:6, 2:6].max() < 60, orientation
        assert np.abs(picture - upright)[10:14, 18:22].max() < 60, orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_broken_exif_says_nothing_against_a_picture(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert read_image(tmp_path / "a.png", None)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("under", "level"), [("black", 0), ("white", 255)])
def test_what_is_transparent_is_laid_on_a_colour_and_told_once(under, level, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_notes", {})
    clear = Image.fromarray(np.uint8([[[9, 200, 77, alpha] for alpha in (0, 51, 255)]]))
    clear.save(tmp_path / "a.png")
    for _ in range(2):
        expected = [[level] * 3, [round(0.2 * c + 0.8 * level) for c in (9, 200, 77)], [9, 200, 77]]
        assert np.abs(read_image(tmp_path / "a.png", None, under=under)[0] - np.array(expected)).max() <= 1
    assert capsys.readouterr().err.count("a.png: is transparent") == 1
    clear.convert("P").save(tmp_path / "p.png", transparency=clear.convert("P").getpixel((2, 0)))
    Image.new("L", (3, 1), 40).save(tmp_path / "l.png", transparency=40)
    Image.fromarray(np.uint16([[9 * 257] * 3])).save(tmp_path / "l16.png", transparency=9 * 257)
    for name in ("p.png", "l.png", "l16.png"):
        assert (read_image(tmp_path / name, None, under=under)[0, 2] == level).all(), name
    clear.putalpha(255)
    clear.save(tmp_path / "opaque.png")
    monkeypatch.setattr(cli, "_notes", {})
    assert (read_image(tmp_path / "opaque.png", None, under=under) == [9, 200, 77]).all()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "levels"),
    [
        (np.float32([0, 0.5, 1]), [0, 128, 255]),
        (np.float32([0, 100, 255]), [0, 100, 255]),
        (np.int32([0, 100, 255]), [0, 100, 255]),
        (np.int32([0, 257, 65535]), [0, 1, 255]),
        (np.uint16([0, 100, 255]), [0, 0, 0]),
        (np.float32([-1, 0, 1]), None),
        (np.float32([0, 1, np.nan]), None),
        (np.int32([0, 1, 65536]), None),
    ],
)
def test_numbers_of_other_widths_are_scaled_or_refused(numbers, levels, tmp_path):
    Image.fromarray(numbers[None]).save(tmp_path / "a.tif")
    if levels is None:
        with pytest.raises(UserError, match=r"a.tif: not a readable image \(its numbers are from"):
            read_image(tmp_path / "a.tif", None)
    else:
        assert read_image(tmp_path / "a.tif", None)[0, :, 1].tolist() == levels


def test_every_format_that_pillow_writes_and_reads_is_listed_in_any_case(tmp_path):
    names = [f"a.{suffix}" for suffix in ("AVIF", "BMP", "gif", "jfif", "jp2", "JPEG", "pgm", "tga", "Tiff", "webp")]
    for name in names:
        Image.new("L", (8, 8), 90).save(tmp_path / name)
    for name in ("a.mpg", "a.eps", "a.heic", "a.h5"):
        (tmp_path / name).touch()
    files = list_images(tmp_path)
    assert sorted(file.name for file in files) == sorted(names)
    assert all(np.abs(read_image(file, None).astype(int) - 90).max() <= 3 for file in files)


def test_texts_in_plots_are_no_formulas_and_raise_no_warnings(recwarn):
    with plain_text():
        figure = Figure()
        axes = figure.add_subplot(title="$x_{1$ 圓")
        axes.set_xticks([0, 1], ["$100$", "貓"])
        figure.savefig(io.BytesIO())
        assert not axes.title.get_parse_math()
    assert not recwarn.list

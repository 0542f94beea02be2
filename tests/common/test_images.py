"""Pixels against torchvision's rule, and what becomes of them in grids, captions and GIFs."""

import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image

from common.images import add_captions, grid, save_gif, save_png, to_uint8


def test_rounding_is_save_images(tmp_path):
    images = torch.linspace(-1.2, 1.2, 3 * 40 * 40).reshape(1, 3, 40, 40)
    save_image((images[0] + 1) / 2, tmp_path / "theirs.png")
    save_png(tmp_path / "ours.png", to_uint8(images)[0])
    ours, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("ours", "theirs"))
    assert np.array_equal(ours, theirs)


def test_every_byte_survives_the_round_trip(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(to_uint8((levels.float() / 127.5 - 1)[None])[0], levels)
    save_png(tmp_path / "levels.png", levels)
    with Image.open(tmp_path / "levels.png") as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), levels.permute(1, 2, 0).numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["levels.png"]


def test_grid_places_images_row_by_row():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 2, 2)
    sheet = grid(images, columns=3, scale=2, gap=1)
    assert sheet.shape == (3, 2 * 5 + 1, 3 * 5 + 1)
    assert [[int(sheet[0, 1 + 5 * row, 1 + 5 * column]) for column in range(3)] for row in range(2)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert sheet[:, 0].eq(255).all()


def test_captions_leave_the_picture_whole():
    picture = torch.randint(0, 255, (3, 40, 60), dtype=torch.uint8)
    sheet = add_captions(picture, rows=["first", "second"], columns=["a", "b"], title="digits")
    assert torch.equal(sheet[:, -40:, -60:], picture)
    assert sheet[:, :-40].eq(0).any(), "the title is drawn in black"


def test_gif_holds_every_frame(tmp_path):
    frames = [torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (0, 90, 255)]
    save_gif(tmp_path / "walk.gif", frames, milliseconds=50, hold=900)
    with Image.open(tmp_path / "walk.gif") as gif:
        assert gif.n_frames == 3
        gif.seek(2)
        assert gif.info["duration"] == 900

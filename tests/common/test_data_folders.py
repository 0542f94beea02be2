"""Folders of images: which files are read, in what order, and how they become squares."""

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from common.data import read_folder_images


def picture(path, size, left, right):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), left, dtype=np.uint8)
    pixels[:, size[0] // 2 :] = right
    Image.fromarray(pixels).save(path)


def test_images_come_in_the_order_of_their_paths(tmp_path):
    for k, name in enumerate(("b.png", "a/z.jpg", "c.JPG", "a/y.bmp", ".hidden.png", ".cache/x.png")):
        picture(tmp_path / name, (8, 8), 40 * k, 40 * k)
    (tmp_path / "readme.txt").write_text("no image")
    images = read_folder_images(tmp_path, 8)
    assert images.names == ["a/y.bmp", "a/z.jpg", "b.png", "c.JPG"]
    assert images.images.shape == (4, 3, 8, 8)
    assert [int(image[0, 0, 0]) for image in images.images] == [120, 40, 0, 80]
    assert not images.labels.any()


def test_an_oblong_image_is_cut_to_its_middle(tmp_path):
    picture(tmp_path / "wide.png", (40, 10), 0, 200)
    image = read_folder_images(tmp_path, 10).images[0, 0]
    assert (image[:, :4] == 0).all()
    assert (image[:, 6:] == 200).all()
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, :15], pixels[:, 25:] = 255, 255  # only the middle square is black
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert not read_folder_images(tmp_path, 10).images.any()


def test_larger_images_shrink(tmp_path):
    picture(tmp_path / "large.png", (64, 64), 100, 100)
    images = read_folder_images(tmp_path, 16).images
    assert images.shape == (1, 3, 16, 16)
    assert (images == 100).all()


@pytest.mark.parametrize("content", ["missing", "empty", "broken"])
def test_bad_folders_are_named(tmp_path, content):
    folder = tmp_path / "faces"
    if content != "missing":
        folder.mkdir()
    if content == "broken":
        (folder / "00.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="faces"):
        read_folder_images(folder, 8)

"""Reading images by CSV and from folders, and the order, timesteps, jitter and drawing ahead of batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from common.data import jitter, read_csv_images, read_folder_images, shuffled_indices, stratified_timesteps
from common.images import read_image


@pytest.fixture
def folder(tmp_path):
    """Three 4x4 images in data/, of one grey each."""
    (tmp_path / "data").mkdir()
    for i, grey in enumerate((0, 100, 255)):
        Image.new("RGB", (4, 4), (grey, grey, grey)).save(tmp_path / "data" / f"{i}.png")
    return tmp_path


def table(folder, *lines, header="image_name,label"):
    path = folder / "train.csv"
    path.write_text("\n".join([header, *lines]))
    return path


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        read_csv_images(*arguments, **options)
    return str(caught.value)


def test_images_and_labels_are_read_in_order(folder):
    images = read_csv_images(table(folder, "2.png,7", "0.png,3", "", "1.png,0", ""), classes=10)
    assert images.images.shape == (3, 3, 4, 4)
    assert images.images.dtype == torch.uint8
    assert images.images[:, 1, 2, 3].tolist() == [255, 0, 100]
    assert images.labels.tolist() == [7, 3, 0]
    assert images.names == ["2.png", "0.png", "1.png"]


def test_spreadsheet_habits_are_forgiven(folder):
    path = folder / "train.csv"
    path.write_bytes("\ufeffid, label, image_name\r\n9, 3, 1.png\r\n".encode())
    images = read_csv_images(path)
    assert images.labels.tolist() == [3]
    assert images.images[0, 0, 0, 0] == 100


def test_files_may_lie_beside_the_table(folder):
    (folder / "data").rename(folder / "elsewhere")
    images = read_csv_images(table(folder / "elsewhere", "1.png,4"))
    assert images.images[0, 0, 0, 0] == 100


def test_size_resizes_and_is_demanded_where_images_differ(folder):
    Image.new("RGB", (6, 3), (100, 100, 100)).save(folder / "data" / "wide.png")
    path = table(folder, "1.png,0", "wide.png,0")
    assert "row 3: wide.png is 6x3" in refused(path)
    images = read_csv_images(path, size=8).images
    assert images.shape == (2, 3, 8, 8)
    assert (images == 100).all()


@pytest.mark.parametrize("label", ["10", "-1", "x", "", "1.5", "٣٠", "9" * 30])
def test_bad_labels_are_named_with_their_row(folder, label):
    line = refused(table(folder, "0.png,9", "", f"1.png,{label}"), classes=10)
    assert f"train.csv row 4: label {label!r}: labels are 0 to 9" in line


def test_bad_images_are_named_with_their_row(folder):
    (folder / "data" / "cut.png").write_bytes((folder / "data" / "0.png").read_bytes()[:41])
    for name in ("absent.png", "cut.png", "", "."):
        line = refused(table(folder, "0.png,1", "1.png,1", f"{name},1"))
        assert "row 4" in line
        assert ("absent.png: no such image" if name == "absent.png" else "not a readable image") in line


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "not a CSV file"),
        ("name,label\n0.png,1", "no column image_name"),
        ("a,b\n0.png,1", "no column image_name, label"),
        ("image_name,label\n", "lists no images"),
        ("image_name,label\n\n,\n", "lists no images"),
        ("image_name,label\n0.png,1\n1.png,2,3\n", "not a CSV file"),
        ("image_name,label\n0.png,1,2\n1.png,2,3\n", "more fields"),
        ('image_name,label\n"0.png,1\n', "not a CSV file"),
        ("image_name,label\n0.png\n", "row 2: label ''"),
        ("\xff\xfe\x00\x01" * 50, "not UTF-8 text"),
    ],
)
def test_tables_that_are_none_are_refused(folder, content, complaint):
    path = folder / "train.csv"
    path.write_text(content, encoding="latin-1")
    line = refused(path)
    assert str(path) in line
    assert complaint in line


def test_tables_that_cannot_be_read_are_refused(folder):
    assert "no such file" in refused(folder / "absent.csv")
    assert "cannot be read" in refused(folder)


def test_every_image_mode_becomes_rgb(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    colours = np.stack([grey, 255 - grey, grey // 2], axis=2)
    palette = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE)
    expected = {
        "L": (Image.fromarray(grey), np.stack([grey] * 3, axis=2)),
        "I;16": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, axis=2)),
        "1": (Image.fromarray(grey > 100), np.stack([(grey > 100) * np.uint8(255)] * 3, axis=2)),
        "P": (palette, colours),
    }
    for mode, (image, pixels) in expected.items():
        path = tmp_path / "image.png"
        image.save(path)
        with Image.open(path) as stored:
            assert stored.mode == mode
        assert np.array_equal(read_image(path, None), pixels), mode


def test_an_oblong_image_is_cut_to_its_middle(tmp_path):
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, :15], pixels[:, 25:] = 255, 255  # only the middle square is black
    (tmp_path / "below").mkdir()
    Image.fromarray(pixels).save(tmp_path / "below" / "wide.png")
    images = read_folder_images(tmp_path, 10)
    assert not images.images.any()
    assert images.names == ["below/wide.png"]


def test_every_epoch_shows_every_image_once():
    walk = shuffled_indices(23, seed=5, start=0, length=23 * 4)
    epochs = walk.reshape(4, 23)
    assert all(torch.equal(epoch.sort().values, torch.arange(23)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert not torch.equal(walk, shuffled_indices(23, seed=6, start=0, length=23 * 4))


@pytest.mark.parametrize("batch", [1, 5, 23, 40])
def test_the_walk_has_no_memory(batch):
    walk = shuffled_indices(23, seed=5, start=0, length=92)
    pieces = {start: shuffled_indices(23, 5, start, min(batch, 92 - start)) for start in reversed(range(0, 92, batch))}
    assert torch.equal(torch.cat([pieces[start] for start in sorted(pieces)]), walk)


def test_timesteps_are_stratified_and_uniform():
    counts = torch.zeros(10)
    for seed in range(500):
        t = stratified_timesteps(4, 10, torch.Generator().manual_seed(seed))
        # One from each quarter of [0, 10), in an order that is not theirs.
        assert all(k * 2.5 - 1 < timestep < (k + 1) * 2.5 for k, timestep in enumerate(t.sort().values.tolist()))
        counts += torch.bincount(t, minlength=10)
    # Each of 2000 draws is uniform; three standard deviations of an even tenth are 40.
    assert (counts - 200).abs().max() < 40
    t = stratified_timesteps(1000, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(t.sort().values, torch.arange(1000))
    assert not torch.equal(t, torch.arange(1000))


def test_jitter_only_moves_when_contrast_is_zero():
    shift, size = 2, 7
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    padded = np.pad(image[0].numpy(), ((0, 0), (shift, shift), (shift, shift)), mode="edge")
    views = {(y, x): padded[:, y : y + size, x : x + size] for y in range(5) for x in range(5)}
    seen = set()
    for moved in jitter(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(1), shift, contrast=0.0):
        matches = [place for place, view in views.items() if np.array_equal(view, moved.numpy())]
        assert len(matches) == 1  # a mirrored or otherwise changed image would match none
        seen.update(matches)
    assert seen == set(views)


def test_jitter_without_shift_is_an_affine_change_within_bounds():
    values = torch.linspace(-0.5, 0.5, 12).reshape(1, 3, 2, 2).expand(200, -1, -1, -1)
    changed = jitter(values, torch.Generator().manual_seed(2), shift=0, contrast=0.2).flatten(1)
    gain = (changed[:, -1] - changed[:, 0]) / (values.flatten(1)[:, -1] - values.flatten(1)[:, 0])
    offset = changed.mean(1)
    assert (changed - (gain[:, None] * values.flatten(1) + offset[:, None])).abs().max() < 1e-6
    assert 0.8 <= gain.min() < 0.82
    assert 1.18 < gain.max() <= 1.2
    assert -0.1 <= offset.min() < -0.09
    assert 0.09 < offset.max() <= 0.1
    assert jitter(torch.ones(50, 1, 2, 2), torch.Generator().manual_seed(3)).max() == 1

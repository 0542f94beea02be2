"""The comparison with real faces, on features that are known."""

import builtins
import json

import pytest
import torch

from common.cli import UserError, run
from p2_ddim import quality
from p2_ddim.quality import nearest_training_faces


def pixels_as_features(images):
    return images.float().mean(dim=3).flatten(1)[:, ::4]


def arguments(face_folder, weights, out, *flags):
    paths = ["--data", str(face_folder), "--weights", str(weights), "--out", str(out)]
    return quality.parse_arguments([*paths, "--steps", "2", *flags])


@pytest.fixture(scope="session")
def many_faces(tmp_path_factory):
    """A hundred pictures of noise, so that ten are held out."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("many")
    generator = torch.Generator().manual_seed(0)
    for k in range(100):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{k:03d}.png")
    return folder


def test_drawn_and_training_faces_are_compared_with_held_out_ones(many_faces, face_weights, tmp_path, capsys):
    args = arguments(many_faces, face_weights, tmp_path / "out", "--count", "8")
    figures = quality.main(args, pixels_as_features)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["faces.png", "nearest.png", "quality.json"]
    assert json.loads((tmp_path / "out" / "quality.json").read_text()) == figures
    assert json.loads(capsys.readouterr().out) == figures
    assert figures["training"]["frechet"] < figures["drawn"]["frechet"]
    assert figures["count"] == 8


def test_copies_are_found_even_if_mirrored():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    held_out = torch.randint(0, 256, (5, 3, 8, 8), generator=generator, dtype=torch.uint8)
    drawn = torch.stack([train[3], train[7].flip(2), (train[5].int() // 2 + 50).byte()])
    picture, figures = nearest_training_faces(drawn, held_out, train)
    assert figures["drawn"]["smallest"] == 0
    assert figures["drawn"]["median"] == 0
    assert figures["held-out"]["smallest"] > 50
    difference = (train[:, None].float() - held_out[None].float()).square().mean(dim=(2, 3, 4)).sqrt()
    mirrored = (train.flip(3)[:, None].float() - held_out[None].float()).square().mean(dim=(2, 3, 4)).sqrt()
    expected = torch.minimum(difference.amin(dim=0), mirrored.amin(dim=0)).min()
    assert figures["held-out"]["smallest"] == pytest.approx(expected.item(), rel=1e-4)
    assert picture.dtype == torch.uint8


@pytest.mark.parametrize("count", ["3", "11"])
def test_counts_that_cannot_be_compared(many_faces, face_weights, tmp_path, count, capsys):
    args = arguments(many_faces, face_weights, tmp_path / "out", "--count", count)
    with pytest.raises(SystemExit):
        run(lambda args: quality.main(args, pixels_as_features), args)
    assert f"--count {count}: choose from 4 to 10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_network_for_features_is_named_where_it_is_missing(monkeypatch):
    original = builtins.__import__

    def absent(name, *rest, **options):
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install"):
        quality.imagenet_features()

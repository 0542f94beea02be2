"""The comparison with real faces, on features that are known."""

import json
import sys

import pytest
import torch

from common.cli import UserError
from common.images import save_png
from p2_ddim import quality
from p2_ddim.quality import nearest_training_faces
from tests.programs import parse


def random_faces(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture
def arguments(face_weights, tmp_path):
    """A function from flags to arguments for a hundred faces of noise, so that ten are held out."""
    for k, face in enumerate(random_faces(100, 16, seed=0)):
        save_png(tmp_path / "data" / f"{k:03d}.png", face)
    paths = "--data", tmp_path / "data", "--weights", face_weights, "--out", tmp_path / "out"
    return lambda *flags: parse(quality, *paths, "--steps", 2, *flags)


def extract_pixels(images):
    return images.float().mean(dim=3).flatten(1)[:, ::4]


def test_drawn_and_training_faces_are_compared_with_held_out_ones(arguments, tmp_path, capsys):
    file = tmp_path / "figures.json"
    figures = quality.main(arguments("--count", "8", "--json", str(file)), extract_pixels)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["faces.png", "nearest.png"]
    assert json.loads(file.read_text()) == json.loads(capsys.readouterr().out) == figures
    assert figures["training"]["frechet"] < figures["drawn"]["frechet"]
    assert figures["count"] == 8


def test_copies_are_found_even_if_mirrored():
    train, held_out = random_faces(20, 8, seed=0), random_faces(5, 8, seed=1)
    picture, figures = nearest_training_faces(torch.stack([train[3], train[7].flip(2)]), held_out, train)
    assert figures["drawn"] == {"smallest": 0, "median": 0}
    pairs = [(face, other) for face in held_out.float() for one in train.float() for other in (one, one.flip(2))]
    expected = min((face - other).square().mean().sqrt().item() for face, other in pairs)
    assert figures["held-out"]["smallest"] == pytest.approx(expected, rel=1e-4)
    assert picture.dtype == torch.uint8


@pytest.mark.parametrize("count", ["3", "11"])
def test_counts_that_cannot_be_compared(arguments, tmp_path, count, refusal):
    line = refusal(lambda args: quality.main(args, extract_pixels), arguments("--count", count))
    assert line.startswith(f"--count {count}: must be from 4 to 10")
    assert not (tmp_path / "out").exists()


def test_the_network_for_features_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="pip install"):
        quality.imagenet_features()

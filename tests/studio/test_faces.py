"""The faces tab draws what sample.py draws from the same noises, and says honestly when there are no weights."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from common.sampling import ImageNoise
from p2_ddim import sample
from studio.faces import Faces


def noise(k: int, shape=(3, 16, 16)) -> torch.Tensor:
    return ImageNoise([(0, k)]).draw(shape)[0]


@pytest.fixture
def faces(face_weights) -> Faces:
    return Faces(face_weights, torch.device("cpu"), "fp32")


def test_four_faces(faces, face_weights, tmp_path, last, shrunk):
    a, b = noise(2).double(), noise(5).double()
    theta = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    on_sphere = (torch.sin(0.75 * theta) * a + torch.sin(0.25 * theta) * b) / torch.sin(theta)
    (tmp_path / "noise").mkdir()
    for k, xt in enumerate((a, on_sphere, 0.75 * a + 0.25 * b, b)):
        torch.save(xt.float()[None], tmp_path / "noise" / f"{k}.pt")
    arguments = [tmp_path / "noise", tmp_path / "out", face_weights, "--steps", 3, "--batch-size", 4]
    sample.main(sample.parse_arguments([str(argument) for argument in arguments]))
    *pictures, _ = last(faces.draw(2, 5, 0.25, 3))
    for k, picture in enumerate(pictures):
        expected = np.asarray(Image.open(tmp_path / "out" / f"{k}.png")).astype(int)
        # x_T differs in its last bits, which may round a pixel the other way.
        assert np.abs(shrunk(picture, 16) - expected).max() <= 1, k
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_lengths(faces):
    a, b = noise(0).double(), noise(1).double()
    found = faces.lengths(0, 1, 0.5)
    assert found.lerp == pytest.approx(float((a + b).norm()) / 2, rel=1e-5)
    # Half way on the sphere: (a + b) / (2 cos(theta / 2)).
    cosine = (a * b).sum() / (a.norm() * b.norm())
    assert found.slerp == pytest.approx(found.lerp / float(torch.sqrt((1 + cosine) / 2)), rel=1e-5)
    assert found.shell == pytest.approx(np.sqrt(3 * 16 * 16))
    assert found.lerp < 0.8 * found.shell


def test_without_weights_lengths_are_known_all_the_same(tmp_path, face_weights, last):
    weights = tmp_path / "faces.safetensors"
    faces = Faces(weights, torch.device("cpu"), "fp32")
    assert str(weights) in faces.missing()
    assert faces.lengths(0, 1, 0.0).slerp == pytest.approx(float(noise(0, (3, 64, 64)).norm()), rel=1e-5)
    assert faces.plot(0, 1).mode == "RGB"
    with pytest.raises(UserError, match="no face weights there"):
        next(faces.draw(0, 1, 0.5, 2))
    shutil.copy(face_weights, weights)
    assert faces.missing() == ""
    assert len(last(faces.draw(0, 1, 0.5, 2))) == 5
    assert faces.lengths(0, 1, 0.0).shell == pytest.approx(np.sqrt(3 * 16 * 16))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ((None, 1, 0.5, 2), "^first noise is empty: choose from 0 to 99$"),
        ((0, 100, 0.5, 2), "^second noise 100"),
        ((0, 1, 1.5, 2), r"^alpha 1\.5"),
        ((0, 1, 0.5, 0), "^steps 0"),
    ],
)
def test_bad_input(faces, values, complaint):
    with pytest.raises(UserError, match=complaint):
        next(faces.draw(*values))


def test_broken_weights(tmp_path):
    (tmp_path / "faces.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        next(Faces(tmp_path / "faces.safetensors", torch.device("cpu"), "fp32").draw(0, 1, 0.5, 2))

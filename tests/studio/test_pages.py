"""Every page draws what its problem's program writes, and says honestly what is missing or cannot be drawn."""

import json
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from common.sampling import ImageNoise
from p1_ddpm import sample as digit_sample
from p2_ddim import sample as face_sample
from p3_controlnet import sample as hint_sample
from p3_personalization import generate
from studio.pages import Circles, Digits, Faces, Words, show_moment
from studio.parts import line
from tests.programs import parse, read, run

CPU = torch.device("cpu")


def values_of(page, **changes):
    """What the page's controls say at first, and these changes."""
    return {name: control.value for row in page.controls for name, control in row.items()} | changes


def draw(page, **changes):
    """Draw to the end, and look at the progress; the last that is shown."""
    values = values_of(page, **changes)
    drawn, (unit, count) = list(page.draw(values)), page.unit
    total = values[count]
    told = [line(f"{unit} {k} of {total}", k, total) for k in range(1, total + 1)]
    assert [status for _, status in drawn[:-1]] == told
    assert "<span>Done." in drawn[-1][1]
    assert "<progress" not in drawn[-1][1]
    return drawn[-1][0]


def cells(picture, side, columns=1, scale=4, gap=0):
    """The images of `side` pixels in a picture of the page, row by row, without the enlargement: (N, side, side, 3)."""
    step, pixels = side * scale + gap, np.asarray(picture)
    assert pixels.shape[1] == columns * step + gap
    parts = pixels[gap:, gap:].reshape(-1, step, columns, step, 3).swapaxes(1, 2)[:, :, : side * scale, : side * scale]
    small = parts[:, :, ::scale, ::scale]
    assert np.array_equal(parts, small.repeat(scale, 2).repeat(scale, 3))
    return small.reshape(-1, side, side, 3).astype(int)


def args_of(program, base, *flags):
    return Namespace(**vars(parse(program, "--device", "cpu", "--precision", "fp32", *flags)) | {"base": base})


@pytest.fixture
def digits(tiny_digit_weights):
    return Digits(tiny_digit_weights, CPU, "fp32")


@pytest.fixture
def circles(pipeline_folder, controlnet_folder):
    return Circles(args_of(hint_sample, pipeline_folder, "--controlnet", controlnet_folder))


@pytest.fixture
def words(pipeline_folder, words_file, custom_file):
    return Words(args_of(generate, pipeline_folder, "--words", words_file, "--custom", custom_file))


DIGITS = {"domain": "svhn", "label": 7, "count": 6, "guidance_scale": 3.0, "sampler": "ddim", "steps": 3, "seed": 5}


def test_digits_are_those_of_sample(digits, tiny_digit_weights, tmp_path):
    flags = "--layout 2024 --classes 7 --count 6 --guidance-scale 3 --sampler ddim --steps 3 --seed 5".split()
    run(digit_sample, tmp_path, *flags, "--precision", "fp32", "--device", "cpu", "--weights", tiny_digit_weights)
    (caption, xt), (_, x0) = show_moment(draw(digits, **DIGITS), 3)
    assert caption == "the end: images"
    drawn = cells(xt, 28, columns=4, gap=2)
    for k in range(6):
        assert np.array_equal(drawn[k], read(tmp_path / "svhn" / f"7_{k + 1:03d}.png")), k
    assert np.array_equal(np.asarray(xt), np.asarray(x0))


def test_the_way_goes_from_noise_to_image(digits):
    moments = draw(digits, **DIGITS)
    assert [t for t, *_ in moments] == [999, 666, 332, None]
    # Standard normal noise in [-1, 1]: a third lies outside and is cut.
    assert ((moments[0][1] == 0) | (moments[0][1] == 255)).double().mean().item() == pytest.approx(0.317, abs=0.02)
    shown = [show_moment(moments, position)[0][0] for position in (0, 2.0, 99, -1, None)]
    assert shown == ["xt at t = 999", "xt at t = 332", "the end: images", "xt at t = 999", "xt at t = 999"]


def noise(k, shape=(3, 16, 16)):
    return ImageNoise([(0, k)]).draw(shape)[0]


def test_four_faces(face_weights, tmp_path):
    a, b = noise(2).double(), noise(5).double()
    theta = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    on_sphere = (torch.sin(0.75 * theta) * a + torch.sin(0.25 * theta) * b) / torch.sin(theta)
    (tmp_path / "noise").mkdir()
    for k, xt in enumerate((a, on_sphere, 0.75 * a + 0.25 * b, b)):
        torch.save(xt.float()[None], tmp_path / "noise" / f"{k}.pt")
    run(face_sample, tmp_path / "noise", tmp_path / "out", face_weights, "--steps", 3, "--batch-size", 4)
    faces = Faces(face_weights, CPU)
    changes = {"noise1": 2, "noise2": 5, "alpha": 0.25, "steps": 3}
    pictures = [picture for _, picture in draw(faces, **changes)]
    for k, picture in enumerate(pictures):
        # x_T differs in its last bits, which may round a pixel the other way.
        assert np.abs(cells(picture, 16, scale=16)[0] - read(tmp_path / "out" / f"{k}.png")).max() <= 1, k
    assert len({picture.tobytes() for picture in pictures}) == 4
    told, _ = faces.preview(values_of(faces, **changes))
    lengths = [float(number) for number in re.findall(r"\d+\.\d", told)]
    expected = on_sphere.norm(), (0.75 * a + 0.25 * b).norm(), (3 * 16 * 16) ** 0.5
    assert lengths == pytest.approx([float(length) for length in expected], abs=0.06)


def test_lengths_are_known_before_there_are_face_weights(tmp_path, face_weights):
    weights = tmp_path / "faces.safetensors"
    faces = Faces(weights, CPU)
    assert str(weights) in faces.note()
    told, plot = faces.preview(values_of(faces, alpha=0.0))
    assert f"slerp {noise(0, (3, 64, 64)).norm():.1f}" in told
    assert plot.mode == "RGB"
    shutil.copy(face_weights, weights)
    assert faces.note() == ""
    assert len(draw(faces, steps=2)) == 4
    assert "√D = 27.7" in faces.preview(values_of(faces))[0]  # sqrt(3 x 16 x 16)


PLACES = {"x1": 70, "y1": 62, "radius1": 16, "x2": 33, "y2": 45, "radius2": 22}
HINTED = {"prompt": "red circle", "strength": 0.5, "guidance_scale": 2.0, "sampler": "ddim", "steps": 3, "seed": 7}


def test_the_picture_is_that_of_sample(circles, pipeline_folder, controlnet_folder, tmp_path):
    # The outlines by hand: anti-aliased lines of two pixels about each edge.
    y, x = np.mgrid[:64, :64] + 0.5
    edges = [abs(np.hypot(x - 0.64 * cx, y - 0.64 * cy) - 0.64 * r) for cx, cy, r in ((70, 62, 16), (33, 45, 22))]
    outlines = np.clip(1.5 - np.minimum(*edges), 0, 1)
    Image.fromarray(np.uint8(255 * outlines + 0.5)).convert("RGB").save(tmp_path / "hint.png")
    pair = {"source": "hint.png", "target": "picture.png", "prompt": "red circle"}
    (tmp_path / "prompt.json").write_text(json.dumps(pair))
    places = [tmp_path / "prompt.json", tmp_path, tmp_path / "out", pipeline_folder, "--controlnet", controlnet_folder]
    flags = "--control-scale 0.5 --guidance-scale 2 --steps 3 --seed 7 --device cpu --precision fp32".split()
    run(hint_sample, *places, *flags)
    ((_, picture),) = draw(circles, **PLACES, **HINTED)
    expected = read(tmp_path / "out" / "picture.png")
    assert np.abs(cells(picture, 64, scale=6)[0] - expected).max() <= 1
    ((_, without),) = draw(circles, **PLACES, **HINTED | {"strength": 0})
    assert np.abs(cells(without, 64, scale=6)[0] - expected).max() > 10


def test_circles_are_told_from_left_to_right(circles):
    values = values_of(circles, **PLACES, colour1="navy", colour2="gold")
    assert circles.preview(values)[0] == "gold circle and navy circle with pink background"
    assert circles.preview(values | {"circles": 1})[0] == "navy circle with pink background"


def test_the_nearest_circle_moves(circles):
    assert circles.move_nearest(values_of(circles, **PLACES), 60.3, 60) == {"x1": 60, "y1": 60}
    assert circles.move_nearest(values_of(circles, **PLACES), 0, 99) == {"x2": 0, "y2": 99}
    assert circles.move_nearest(values_of(circles, **PLACES, circles=1), 0, 99) == {"x1": 0, "y1": 99}


def test_what_the_miniature_cannot_read():
    circles = Circles(hint_sample.parse_arguments([]))
    known = ["gold circle and navy circle with pink background", "golden circle with navy background", "a dog", ""]
    assert [bool(circles.remark({"prompt": prompt})) for prompt in known] == [False, True, True, True]


WORDS = {"count": 2, "guidance_scale": 2.0, "sampler": "ddim", "steps": 2, "seed": 4}


@pytest.mark.parametrize(
    ("way", "token"), [(generate.INVERSION, "<new1>"), (generate.CUSTOM_DIFFUSION, "<new2>")], ids=["words", "custom"]
)
def test_pictures_are_those_of_generate(words, pipeline_folder, tmp_path, way, token):
    prompt, table = f"a {token} here", tmp_path / "input.json"
    table.write_text(json.dumps({"0": {"src_image": "some", "token_name": token, "prompt": [prompt]}}))
    learned = ["--words", *words.args.words] if way == generate.INVERSION else ["--custom", words.args.custom]
    flags = "--count 2 --guidance-scale 2 --sampler ddim --steps 2 --seed 4 --device cpu --precision fp32".split()
    files = run(generate, table, tmp_path / "out", pipeline_folder, *learned, *flags)
    ((_, picture),) = draw(words, **WORDS, prompt=prompt, way=way)
    drawn = cells(picture, 64, columns=2, gap=2)
    assert max(np.abs(image - read(file)).max() for image, file in zip(drawn, files)) <= 1


def test_each_way_knows_its_own_words(words, pipeline_folder, words_file):
    assert words.note() == "Learned: <new1>, <new2>"
    for way, token in ((generate.INVERSION, "<new2>"), (generate.CUSTOM_DIFFUSION, "<new1>")):
        with pytest.raises(UserError, match=f"{token} is no learned word"):
            draw(words, prompt=f"a {token}", way=way)
    with pytest.raises(UserError, match=r"^Custom Diffusion learned nothing for this base yet; run .* --custom$"):
        draw(Words(args_of(generate, pipeline_folder, "--words", words_file)), way=generate.CUSTOM_DIFFUSION)


def test_words_that_come_later(pipeline_folder, words_file, tmp_path, monkeypatch):
    usual = tmp_path / "words.safetensors"
    monkeypatch.setattr(generate, "default_words", lambda base: usual)
    words = Words(args_of(generate, pipeline_folder))
    assert "nothing yet" in words.note()
    draw(words, **WORDS, prompt="a dog")
    usual.write_bytes(words_file.read_bytes())
    assert words.note() == "Learned: <new1>"
    draw(words, **WORDS, prompt="a <new1>")
    usual.write_bytes(b"torn")
    for use in (words.note, lambda: draw(words)):
        with pytest.raises(UserError, match="is a text file"):
            use()


@pytest.mark.parametrize(
    ("page", "wrong", "complaint"),
    [
        ("digits", {"label": 10}, "^digit 10: choose from 0 to 9$"),
        ("circles", {"colour2": None}, "^circle 2: colour is empty"),
        ("words", {"way": "magic"}, "^learned by magic: choose textual inversion, Custom Diffusion$"),
    ],
)
def test_bad_input(request, page, wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        draw(request.getfixturevalue(page), **wrong)


def test_missing_and_broken_weights(tmp_path, controlnet_folder):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"torn")
    none, flags = tmp_path / "none.safetensors", ("--controlnet", controlnet_folder)
    for page, complaint in (
        (Digits(none, CPU, "fp32"), "no such weights file"),
        (Faces(none, CPU), "no such weights file"),
        (Faces(torn, CPU), "is a text file"),
        (Circles(args_of(hint_sample, none, *flags)), "no such file or folder"),
        (Circles(args_of(hint_sample, none)), "no ControlNet for"),
    ):
        with pytest.raises(UserError, match=complaint):
            draw(page)

"""Zero-shot classification: scores against transformers' own calls, what is counted and drawn of them, bad folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from latent_diffusion import clip
from latent_diffusion.clip import Clip
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import held_out, random_scenes
from p3_personalization import zeroshot
from p3_personalization.zeroshot import ZeroShotData
from tests.programs import parse, run

TEMPLATES = ["{} circle", "a {}", "{} and {}"]


@pytest.mark.parametrize("combine", ["mean", "best"])
def test_scores_are_those_of_transformers_calls(clip_folder, clip_vectors, combine, monkeypatch):
    monkeypatch.setattr(zeroshot, "PICTURES_AT_ONCE", 4)
    monkeypatch.setattr(clip, "BATCH", 3)
    monkeypatch.setattr(clip, "TEXTS", 3)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (40 + 20 * k, 64, 3), dtype=np.uint8) for k in range(5)]
    data = ZeroShotData(["red", "sky blue", "gold"], torch.zeros(5, dtype=torch.int64), pictures.__getitem__)
    scores = zeroshot.class_scores(Clip(clip_folder), data, TEMPLATES, combine)
    of_image, of_text = clip_vectors
    for k, picture in enumerate(pictures):
        for column, name in enumerate(data.classes):
            texts = torch.stack([of_text(text) for text in (f"{name} circle", f"a {name}", f"{name} and {name}")])
            mean = texts.mean(dim=0)
            wanted = mean / mean.norm() @ of_image(picture) if combine == "mean" else (texts @ of_image(picture)).max()
            assert abs(scores[k, column] - wanted) < 1e-5
    assert scores.std() > 1e-3


def test_accuracies_count_what_was_named():
    scores = torch.tensor(
        [
            [9, 1, 2, 3, 4, 5, 6],  # 0: right
            [8, 9, 7, 6, 5, 4, 3],  # 0: second
            [1, 9, 0, 0, 0, 0, 0],  # 1: right
            [9, 1, 8, 7, 6, 5, 4],  # 1: seventh
            [9, 8, 7, 6, 5, 4, 3],  # 4: fifth
        ]
    ).float()
    confusion = np.zeros((7, 7), int)
    confusion[[0, 0, 1, 1, 4], [0, 1, 1, 0, 0]] = 1
    assert zeroshot.accuracies(scores, torch.tensor([0, 0, 1, 1, 4])) == {
        "pictures": 5, "classes": 7, "top1": 2 / 5, "top5": 4 / 5, "confusion": confusion.tolist(),
    }  # fmt: skip


def test_distinct_colours_are_the_most_unlike():
    names = zeroshot.distinct_colours(50)
    lab = rgb_to_lab([COLOURS[name] for name in names])
    assert ciede2000(lab[:, None], lab)[~np.eye(50, dtype=bool)].min() > 10
    assert zeroshot.distinct_colours(len(COLOURS))[:50] == names


def test_circles_are_held_out_and_depend_on_their_number_alone():
    classes = ["red", "gold", "navy"]
    data, some = (zeroshot.make_circles(classes, count, seed=3) for count in (40, 10))
    assert torch.equal(data.labels[:10], some.labels)
    assert set(data.labels.tolist()) == {0, 1, 2}
    scenes = random_scenes(10**6, zeroshot.SIZE, 3, circles=(1,), held_out=True)
    scenes = (scene for scene in scenes if scene.circles[0].colour in classes)
    for k, scene in zip(range(40), scenes):
        disc = scene.circles[0].colour
        assert held_out(disc, scene.background)
        assert classes[data.labels[k]] == disc
        present = {tuple(pixel) for pixel in data.read(k).reshape(-1, 3).tolist()}
        assert {COLOURS[disc], COLOURS[scene.background]} <= present
    assert np.array_equal(data.read(9), some.read(9))


@pytest.fixture
def folder(tmp_path):
    """The course's layout: three classes, whose numbers have a gap, and seven pictures of several sizes and kinds."""
    folder = tmp_path / "clip_zeroshot"
    (folder / "val").mkdir(parents=True)
    names = {"10": "gold", "0": "red", "2": "sky blue"}
    (folder / "id2label.json").write_text(json.dumps(names), encoding="utf-8-sig")
    random = np.random.default_rng(1)
    for k, number in enumerate([0, 0, 2, 2, 2, 10, 10]):
        pixels = random.integers(0, 256, (30 + 7 * k, 50, 3), dtype=np.uint8)
        name = f"{number}_{450 + k}.{'jpg' if k == 3 else 'png'}"
        Image.fromarray(pixels).convert("L" if k == 2 else "RGB").save(folder / "val" / name)
    (folder / "val" / ".DS_Store").write_bytes(b"")
    return folder


def test_the_course_s_folder(folder, clip_folder, tmp_path):
    data = zeroshot.read_folder(folder)
    assert data.classes == ["red", "sky blue", "gold"]
    assert data.labels.tolist() == [0, 0, 2, 2, 1, 1, 1]  # 0_450, 0_451, 10_455, 10_456, 2_452, ...
    out = tmp_path / "out"
    flags = "--clip", clip_folder, "--out", out, "--json", tmp_path / "f.json", "--precision", "fp32"
    result = run(zeroshot, folder, *flags)
    assert json.loads((tmp_path / "f.json").read_text()) == result
    assert (result["templates"], result["combine"]) == ([zeroshot.TEMPLATE], "mean")
    assert [sum(row) for row in result["confusion"]] == [2, 3, 2]
    scores = zeroshot.class_scores(Clip(clip_folder), data, [zeroshot.TEMPLATE], "mean")
    assert result["top1"] == (scores.argmax(dim=1) == data.labels).double().mean().item()
    assert sorted(path.name for path in out.iterdir()) == ["confusion.png", "examples.png"]
    assert Image.open(out / "examples.png").size == (1320, 1200)


def test_the_miniature_knows_some_colours(tmp_path):
    templates = [f"{{}} circle with {name} background" for name in ("white", "black", "gray", "red")]
    few = ["--classes", 8, "--count", 60, "--precision", "fp32", "--out", tmp_path]
    result = run(zeroshot, *few, "--templates", *templates)
    assert (result["classes"], result["pictures"], result["combine"]) == (8, 60, "best")
    assert result["top1"] > 0.6  # chance is an eighth


@pytest.mark.parametrize(
    ("harm", "flags", "words"),
    [
        (lambda d: (d / "id2label.json").write_text('{"0": "red", "2": "blue"}'), [], "10_455.png: its class 10 is"),
        (lambda d: (d / "id2label.json").write_text("{"), [], "id2label.json: not JSON (Expecting"),
        (lambda d: (d / "id2label.json").write_text('["red"]'), [], "id2label.json: not a table of classes ('list'"),
        (lambda d: (d / "id2label.json").write_text('{"0": 3}'), [], "not a table of classes (a name is missing)"),
        (lambda d: (d / "id2label.json").unlink(), [], "id2label.json: no such file; write"),
        (lambda d: shutil.rmtree(d / "val"), [], "val: no such folder"),
        (lambda d: (d / "val" / "0_450.png").rename(d / "val" / "red.png"), [], "red.png: its class red is not"),
        (lambda d: (d / "val" / "0_450.png").write_bytes(b"PNG"), [], "0_450.png: not a readable image"),
        (lambda d: None, ["--classes", "1000"], "--classes 1000: must be from 2 to"),
        (lambda d: None, ["--count", "0"], "--count 0: must be at least 1"),
        (lambda d: None, ["--templates", "a {} circle", "a circle"], "--templates 'a circle': has no {}"),
        (lambda d: None, ["--clip", "absent"], "absent: no such folder"),
    ],
)
def test_what_cannot_be_classified_is_one_clear_line(folder, clip_folder, tmp_path, refusal, harm, flags, words):
    harm(folder)
    fixed = [folder, "--clip", clip_folder, "--out", tmp_path / "out"]
    assert words in refusal(zeroshot.main, parse(zeroshot, *fixed, *flags))
    assert not list((tmp_path / "out").glob("*"))

"""Zero-shot classification: scores against transformers' own calls, what is counted and drawn of them, bad folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from latent_diffusion.clip import Clip
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import held_out, read_prompt
from p3_personalization import zeroshot
from p3_personalization.zeroshot import Examples

TEMPLATES = ["{} circle", "a {}", "{} and {}"]


@pytest.fixture
def examples():
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(5)]
    names = [f"{k}.png" for k in range(5)]
    return Examples(["red", "sky blue", "gold"], names, torch.tensor([0, 1, 2, 1, 0]), lambda k: pictures[k])


@pytest.mark.parametrize("combine", ["mean", "best"])
def test_scores_are_those_of_transformers_calls(clip_folder, examples, combine, monkeypatch):
    monkeypatch.setattr(zeroshot, "PICTURES_AT_ONCE", 2)
    scores = zeroshot.class_scores(Clip(clip_folder), examples, TEMPLATES, combine)
    model, tokenizer, processor = (
        part.from_pretrained(clip_folder) for part in (CLIPModel, CLIPTokenizer, CLIPImageProcessor)
    )
    for k in range(len(examples)):
        pixels = processor(images=examples.read(k), return_tensors="pt")["pixel_values"]
        for column, name in enumerate(examples.classes):
            with torch.no_grad():
                outputs = [
                    model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=20), pixel_values=pixels)
                    for text in (f"{name} circle", f"a {name}", f"{name} and {name}")
                ]
            cosines = [float((output.text_embeds * output.image_embeds).sum()) for output in outputs]
            mean = torch.stack([output.text_embeds for output in outputs]).mean(dim=0)
            wanted = {
                "mean": float((mean / mean.norm() * outputs[0].image_embeds).sum()),
                "best": max(cosines),
            }
            assert abs(float(scores[k, column]) - wanted[combine]) < 1e-5
    assert scores.std() > 1e-3


def test_figures_count_what_was_named():
    scores = torch.tensor(
        [
            [9, 1, 2, 3, 4, 5, 6],  # 0: right
            [8, 9, 7, 6, 5, 4, 3],  # 0: second
            [1, 9, 0, 0, 0, 0, 0],  # 1: right
            [9, 1, 8, 7, 6, 5, 4],  # 1: seventh
            [9, 8, 7, 6, 5, 4, 3],  # 4: fifth
        ]
    ).float()
    figures = zeroshot.figures_of(scores, torch.tensor([0, 0, 1, 1, 4]), list("abcdefg"))
    assert (figures["pictures"], figures["classes"]) == (5, 7)
    assert (figures["top1"], figures["top5"]) == (2 / 5, 4 / 5)
    assert figures["by_class"] == {"a": 1 / 2, "b": 1 / 2, "e": 0}
    confusion = np.zeros((7, 7), int)
    confusion[[0, 0, 1, 1, 4], [0, 1, 1, 0, 0]] = 1
    assert figures["confusion"] == confusion.tolist()


def test_examples_shown_are_of_different_classes_while_there_are_some():
    labels = torch.tensor([3, 3, 1, 1, 2, 3, 0, 0])
    shown = zeroshot.chosen_examples(torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]).bool(), labels)
    assert shown == [1, 2, 3, 4, 6]
    assert zeroshot.chosen_examples(torch.zeros(8).bool(), labels) == []


def test_distinct_colours_are_the_most_unlike():
    names = zeroshot.distinct_colours(50)
    assert len(set(names)) == 50
    lab = rgb_to_lab([COLOURS[name] for name in names])
    apart = ciede2000(lab[:, None], lab)[~np.eye(50, dtype=bool)].min()
    assert apart > 10
    all_names = zeroshot.distinct_colours(len(COLOURS))
    assert sorted(all_names) == sorted(COLOURS)
    assert all_names[:50] == names


def test_circles_are_held_out_and_depend_on_their_number_alone():
    classes = ["red", "gold", "navy"]
    circles = zeroshot.circle_examples(classes, 40, seed=3)
    some = zeroshot.circle_examples(classes, 10, seed=3)
    assert len(circles) == 40
    assert circles.names[:10] == some.names
    assert torch.equal(circles.labels[:10], some.labels)
    for k, prompt in enumerate(circles.names):
        (disc,), background = read_prompt(prompt)
        assert held_out(disc, background)
        assert classes[circles.labels[k]] == disc
        present = {tuple(pixel) for pixel in circles.read(k).reshape(-1, 3).tolist()}
        assert {COLOURS[disc], COLOURS[background]} <= present
    assert set(circles.labels.tolist()) == {0, 1, 2}
    assert zeroshot.circle_examples(classes, 10, seed=4).names != some.names


class Painter:
    """Stands for a CLIP that sees the colour at a picture's edge and reads the second word of a sentence."""

    def embed_images(self, images):
        return torch.nn.functional.normalize(torch.stack([torch.tensor(image[0, 0]).float() for image in images]))

    def embed_texts(self, texts):
        colours = torch.tensor([COLOURS[text.split()[1]] for text in texts]).float()
        return torch.nn.functional.normalize(colours)


def test_a_model_that_knows_everything_is_always_right():
    names = ["red", "lime", "blue", "yellow"]
    examples = Examples(names, names, torch.arange(4), lambda k: np.full((8, 8, 3), COLOURS[names[k]], dtype=np.uint8))
    scores = zeroshot.class_scores(Painter(), examples, ["a {} wall", "the {} wall"], "mean")
    assert zeroshot.figures_of(scores, examples.labels, names)["top1"] == 1


@pytest.fixture
def data(tmp_path):
    """The course's layout: three classes, whose numbers have a gap, and seven pictures of several sizes and kinds."""
    folder = tmp_path / "clip_zeroshot"
    (folder / "val").mkdir(parents=True)
    (folder / "id2label.json").write_text(json.dumps({"10": "gold", "0": "red", "2": "sky blue"}))
    random = np.random.default_rng(1)
    for k, number in enumerate([0, 0, 2, 2, 2, 10, 10]):
        pixels = random.integers(0, 256, (30 + 7 * k, 50, 3), dtype=np.uint8)
        name = f"{number}_{450 + k}.{'jpg' if k == 3 else 'png'}"
        Image.fromarray(pixels).convert("L" if k == 2 else "RGB").save(folder / "val" / name)
    (folder / "val" / ".DS_Store").write_bytes(b"")
    return folder


def classified(*arguments):
    return zeroshot.main(zeroshot.parse_arguments([str(argument) for argument in arguments]))


def test_the_course_s_folder(data, clip_folder, tmp_path, capsys):
    examples = zeroshot.read_examples(data)
    assert examples.classes == ["red", "sky blue", "gold"]
    assert dict(zip(examples.names, examples.labels.tolist())) == {
        "0_450.png": 0, "0_451.png": 0, "2_452.png": 1, "2_453.jpg": 1, "2_454.png": 1, "10_455.png": 2,
        "10_456.png": 2,
    }  # fmt: skip
    out = tmp_path / "out"
    result = classified(data, "--clip", clip_folder, "--out", out, "--json", tmp_path / "f.json", "--precision", "fp32")
    assert json.loads((tmp_path / "f.json").read_text()) == result
    assert (result["pictures"], result["classes"]) == (7, 3)
    assert (result["templates"], result["combine"]) == ([zeroshot.TEMPLATE], "mean")
    assert [sum(row) for row in result["confusion"]] == [2, 3, 2]
    assert result["top5"] == 1
    scores = zeroshot.class_scores(Clip(clip_folder), examples, [zeroshot.TEMPLATE], "mean")
    assert result["top1"] == (scores.argmax(dim=1) == examples.labels).double().mean().item()
    assert sorted(path.name for path in out.iterdir()) == ["confusion.png", "examples.png"]
    assert Image.open(out / "examples.png").size == (1320, 1200)
    assert f"top-1 {result['top1']:.1%}" in capsys.readouterr().out


def test_the_miniature_knows_some_colours(tmp_path):
    templates = [f"{{}} circle with {name} background" for name in ("white", "black", "gray", "red")]
    result = classified(
        "--classes", 8, "--count", 60, "--out", tmp_path, "--templates", *templates, "--precision", "fp32"
    )  # fmt: skip
    assert (result["classes"], result["pictures"], result["combine"]) == (8, 60, "best")
    assert result["top1"] > 0.6  # chance is an eighth


@pytest.fixture
def complaint(refusal, tmp_path):
    """A function that gives the line with which the program refuses its arguments, having written nothing."""

    def refused(*arguments) -> str:
        out = tmp_path / "out"
        line = refusal(zeroshot.main, zeroshot.parse_arguments([*map(str, arguments), "--out", str(out)]))
        assert not list(out.glob("*"))
        return line

    return refused


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda d: (d / "id2label.json").write_text('{"0": "red", "2": "sky blue"}'), "10_455.png: its class 10 is"),
        (lambda d: (d / "id2label.json").write_text("{"), "id2label.json: not JSON"),
        (lambda d: (d / "id2label.json").write_text('["red"]'), "id2label.json: not an object"),
        (lambda d: (d / "id2label.json").write_text('{"0": 3}'), "id2label.json: '0' is 3"),
        (lambda d: (d / "id2label.json").write_text('{"dog": "dog"}'), "id2label.json: 'dog' is"),
        (lambda d: (d / "id2label.json").write_bytes(b"\xff\xfe\x00"), "id2label.json: not JSON"),
        (lambda d: (d / "id2label.json").unlink(), "id2label.json: cannot be read (No such file or directory)"),
        (lambda d: shutil.rmtree(d / "val"), "val: holds no pictures"),
        (lambda d: (d / "val" / "0_450.png").rename(d / "val" / "red.png"), "red.png: its class red is not"),
        (lambda d: (d / "val" / "0_450.png").write_bytes(b"PNG"), "0_450.png: not a readable image"),
    ],
)  # fmt: skip
def test_bad_data_is_one_clear_line(data, clip_folder, complaint, harm, words):
    harm(data)
    assert words in complaint(data, "--clip", clip_folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--classes", "1"], "--classes 1"),
        (["--classes", "1000"], "--classes 1000"),
        (["--count", "0"], "--count 0"),
        (["--templates", "a {} circle", "a circle"], "--templates 'a circle': has no {}"),
    ],
)
def test_bad_arguments_are_one_clear_line(clip_folder, complaint, flags, words):
    assert words in complaint("--clip", clip_folder, *flags)


def test_a_clip_folder_without_tokenizer_is_one_clear_line(data, clip_folder, tmp_path, complaint):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "tokenizer.json").unlink()
    assert f"{folder}: not a CLIP folder" in complaint(data, "--clip", folder)

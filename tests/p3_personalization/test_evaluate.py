"""The 2024 score against transformers' own calls and a closed form; discs whose colours are known; bad folders."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import Circle, Scene, draw_target
from p3_personalization import evaluate
from tests.programs import parse

WINE, PETROL, ROSE = (120, 8, 56), (0, 80, 120), (140, 20, 70)
PALETTE = COLOURS | {"wine": WINE, "petrol": PETROL, "rose": ROSE}
COUNT = 4
TABLE = {
    "0": {
        "token_name": "<new1>",
        "prompt": ["<new1> circle with white background", "<new1> circle and <new2> circle with tan background"],
        "prompt_4_clip_eval": ["maroon circle with white background", "maroon circle and teal circle"],
        "baseline": [[-100, -100], [100, -100]],
    },
    "1": {
        "token_name": "<new2>",
        "prompt": ["<new2> circle with black background"],
        "prompt_4_clip_eval": ["teal circle"],
    },
}
DRAWN = {
    "0/0": [["wine"], ["rose"], ["gold"], ["gold", "wine"]],
    "0/1": [["wine", "petrol"], ["petrol", "wine"], ["wine"], ["wine", "wine"]],
    "1/0": [["petrol"], ["petrol"], ["petrol"], []],
}


def save_scene(path, discs, background="white", x=30.0):
    places = [Circle(x + 36 * k, 48.0, 14.0 + k, name) for k, name in enumerate(discs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_target(Scene(tuple(places), background), 96, PALETTE)).save(path)


@pytest.fixture
def folders(tmp_path):
    """A table, pictures drawn for it, and the pictures that its concepts were learned from."""
    table, out, references = tmp_path / "input.json", tmp_path / "out", tmp_path / "references"
    table.write_text(json.dumps(TABLE))
    for folder, scenes in DRAWN.items():
        number, prompt = folder.split("/")
        for k, discs in enumerate(scenes):
            save_scene(out / folder / f"source{number}_prompt{prompt}_{k}.png", discs)
    for number, name in (("0", "wine"), ("1", "petrol")):
        for k, background in enumerate(["gold", "white", "gray"]):
            save_scene(references / number / f"{k}.png", [name], background, x=30.0 + k)
        (references / number / "0.txt").write_text("{} circle with gold background")
    return table, out, references


@pytest.fixture
def arguments(folders, clip_folder):
    def make(*flags):
        return parse(evaluate, *folders, "--clip", clip_folder, "--count", COUNT, *flags)

    return make


def test_the_best_five_are_chosen_by_image_and_text_together():
    image, text = np.array([[50, 60, 70, 80, 90, 40], [30, 30, 30, 30, 10, 40]])
    # image + 2.5 text: 125, 135, 145, 155, 115, 140
    assert evaluate.best_means(image, text) == {"image": 60, "text": 32, "best": [3, 2, 5, 1, 0]}
    assert evaluate.best_means(image[:2], text[:2]) == {"image": 55, "text": 30, "best": [1, 0]}


def test_scores_are_those_of_transformers_calls(arguments, folders, clip_vectors, tmp_path):
    rows = evaluate.main(arguments("--json", tmp_path / "scores.json"))
    assert json.loads((tmp_path / "scores.json").read_text()) == rows
    of_image, of_text = clip_vectors
    _, out, references = folders
    assert [(row["concept"], row["number"]) for row in rows] == [("0", 0), ("0", 1), ("1", 0)]
    for row in rows:
        words = of_text(row["prompt_4_clip_eval"])
        known = [of_image(Image.open(path)) for path in (references / row["concept"]).glob("*.png")]
        for k in range(COUNT):
            name = f"source{row['concept']}_prompt{row['number']}_{k}.png"
            drawn = of_image(Image.open(out / row["concept"] / str(row["number"]) / name))
            image = 100 * np.mean([(drawn @ other).item() for other in known])
            assert row["images"][k] == pytest.approx(image, abs=1e-3)
            assert row["texts"][k] == pytest.approx(100 * (drawn @ words).item(), abs=1e-3)
        assert [row["image"], row["text"]] == pytest.approx([np.mean(row["images"]), np.mean(row["texts"])])
        assert "difference" not in row
    assert [row.get("passed") for row in rows] == [True, False, None]
    assert [row.get("baseline") for row in rows] == [[-100, -100], [100, -100], None]


def test_discs_are_counted_by_their_colours(arguments, capsys):
    rows = evaluate.main(arguments("--discs"))

    def apart(one, other):
        return float(ciede2000(rgb_to_lab(one), rgb_to_lab(other)))

    assert 0 < apart(ROSE, WINE) < 10 < apart(COLOURS["gold"], WINE)
    assert rows[0]["difference"] == pytest.approx(np.median([0, apart(ROSE, WINE), apart((255, 215, 0), WINE), 0]))
    assert [row["near"] for row in rows] == [0.75, 1, 0.75]
    assert [row["shown"] for row in rows] == [0.75, 0.5, 0.75]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith(f"0/1 {TABLE['0']['prompt'][1]}: image {rows[1]['image']:.2f}, text ")
    assert printed[1].endswith("baseline [100.0, -100.0], passed False, difference 0.00, near 1.00, shown 0.50")


def test_a_prompt_that_mostly_shows_no_disc_has_no_difference():
    pictures = [np.full((64, 64, 3), 200, dtype=np.uint8)] * 3
    scores = evaluate.score_discs(pictures, np.array(WINE), [np.array(WINE)])
    assert scores == {"difference": None, "near": 0, "shown": 0}


@pytest.mark.parametrize(
    ("harm", "flags", "words"),
    [
        (lambda t, o, r: (o / "0/1/source0_prompt1_2.png").unlink(), [], "source0_prompt1_2.png: no such picture"),
        (lambda t, o, r: shutil.copy(o / "0/0/source0_prompt0_0.png", o / "0/0/more.png"), [], "0/0: holds 5 pictures"),
        (lambda t, o, r: (o / "0/0/source0_prompt0_0.png").write_bytes(b""), [], "not a readable image"),
        (lambda t, o, r: shutil.rmtree(r / "1"), [], "1: no such folder; name one with images"),
        (lambda t, o, r: t.write_text('{"0": {"token_name": "<a>", "prompt": ["<a>"]}}'), [], 'no "prompt_4_clip'),
        (lambda t, o, r: save_scene(r / "0" / "3.png", []), ["--discs"], "'0': not all its pictures show a disc"),
        (lambda t, o, r: None, ["--count", "0"], "--count 0: must be at least 1"),
        (lambda t, o, r: None, ["--clip", "absent"], "absent: no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_one_clear_line(folders, arguments, refusal, harm, flags, words):
    harm(*folders)
    assert words in refusal(evaluate.main, arguments(*flags))

"""The grader's table: what is read from it, and what is refused."""

import json

import pytest

from common.cli import UserError
from p3_personalization.table import read_table

COURSE = {
    "0": {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["A dog <new1> on a hill", "A dog <new1> in a room"],
        "prompt_4_clip_eval": ["A dog on a hill", "A dog in a room"],
        "baseline": [[79, 34], [74, 35]],
    },
    "1": {"token_name": "<new2>", "prompt": "A house in the style of <new2>"},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "input.json"
    path.write_text(json.dumps(COURSE), encoding="utf-8-sig")
    return path


def test_the_course_s_table(path):
    dog, style = read_table(path)
    assert (dog.number, dog.token, style.number, style.token) == ("0", "<new1>", "1", "<new2>")
    assert dog.prompts == COURSE["0"]["prompt"]
    assert dog.judged_prompts == COURSE["0"]["prompt_4_clip_eval"]
    assert dog.baselines == [(79.0, 34.0), (74.0, 35.0)]
    assert (style.prompts, style.judged_prompts, style.baselines) == (["A house in the style of <new2>"], [], [])
    assert [str(file) for file in dog.files(1, 2)] == ["0/1/source0_prompt1_0.png", "0/1/source0_prompt1_1.png"]


def changed(**fields):
    return {"0": COURSE["0"] | fields}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("{", ": not JSON"),
        ("[]", ": not an object of concepts"),
        ("{}", ": not an object of concepts"),
        (json.dumps({"../x": COURSE["0"]}), " concept '../x': its name is no number"),
        (json.dumps({"0": []}), " concept '0': is []"),
        (json.dumps(changed(token_name=None)), " concept '0': has no \"token_name\""),
        (json.dumps(changed(prompt=[])), " concept '0': has no \"prompt\""),
        (json.dumps(changed(prompt=[3, 4])), " concept '0': \"prompt\" is [3, 4]"),
        (json.dumps(changed(prompt=["<new1>"])), " concept '0': \"prompt_4_clip_eval\" has 2 entries for 1 prompts"),
        (json.dumps(changed(baseline=[[1, 2]])), " concept '0': \"baseline\" has 1 entries for 2 prompts"),
        (json.dumps(changed(baseline=[[1], [2]])), " concept '0': \"baseline\" is [[1], [2]]"),
        (json.dumps(changed(baseline=7)), " concept '0': \"baseline\" is 7"),
    ],
)
def test_bad_tables_are_refused(path, table, words):
    path.write_text(table)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}{words}")


def test_no_table(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "input.json")

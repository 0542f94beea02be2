"""The words tab draws the first pictures that generate.py writes, and says honestly when nothing was learned."""

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from p3_personalization import generate
from studio import words as page
from studio.words import Words

PROMPT = "a <new1> here"


def arguments(base, *flags):
    args = generate.parse_arguments(["--device", "cpu", "--precision", "fp32", *map(str, flags)])
    args.base = base
    return args


def draw(words, **changes):
    values = {"prompt": PROMPT, "way": page.INVERSION, "count": 2, "guidance_scale": 2.0, "method": "ddim"}
    values |= {"steps": 2, "seed": 4}
    return words.draw(*(values | changes).values())


@pytest.mark.parametrize(("way", "flag"), [(page.INVERSION, "--words"), (page.CUSTOM_DIFFUSION, "--custom")])
def test_the_pictures_are_those_of_generate(pipeline_folder, words_file, custom_file, tmp_path, last, way, flag):
    file, token = {"--words": (words_file, "<new1>"), "--custom": (custom_file, "<new2>")}[flag]
    prompt = PROMPT.replace("<new1>", token)
    table = tmp_path / "input.json"
    table.write_text(f'{{"0": {{"src_image": "some", "token_name": "{token}", "prompt": ["{prompt}"]}}}}')
    flags = [flag, file, "--count", 2, "--guidance-scale", 2, "--sampler", "ddim", "--steps", 2, "--seed", 4]
    given = [table, tmp_path / "out", pipeline_folder, *flags, "--device", "cpu", "--precision", "fp32"]
    files = generate.main(generate.parse_arguments([str(argument) for argument in given]))
    words = Words(arguments(pipeline_folder, "--words", words_file, "--custom", custom_file))
    picture, _ = last(draw(words, prompt=prompt, way=way))
    side = 256 + 2
    pixels = np.asarray(picture)
    assert pixels.shape == (side + 2, 2 * side + 2, 3)
    for k, file in enumerate(files):
        drawn = pixels[2 : 2 + 256 : 4, 2 + k * side : k * side + 258 : 4].astype(int)
        assert np.abs(drawn - np.asarray(Image.open(file))).max() <= 1, k


def test_each_way_knows_its_own_words(pipeline_folder, words_file, custom_file):
    words = Words(arguments(pipeline_folder, "--words", words_file, "--custom", custom_file))
    assert words.tokens() == ["<new1>", "<new2>"]
    for way, token in ((page.INVERSION, "<new2>"), (page.CUSTOM_DIFFUSION, "<new1>")):
        with pytest.raises(UserError, match=f"{token} is no learned word"):
            next(draw(words, prompt=f"a {token}", way=way))
    with pytest.raises(UserError, match=r"^Custom Diffusion learned nothing for this base yet; run .* --custom$"):
        next(draw(Words(arguments(pipeline_folder, "--words", words_file)), way=page.CUSTOM_DIFFUSION))


def test_words_that_come_later(pipeline_folder, words_file, tmp_path, last, monkeypatch):
    usual = tmp_path / "words.safetensors"
    monkeypatch.setattr(page, "default_words", lambda base: usual)
    words = Words(arguments(pipeline_folder))
    assert words.tokens() == []
    assert str(usual) in words.missing()
    last(draw(words, prompt="a dog"))
    with pytest.raises(UserError, match="<new1> is no learned word"):
        next(draw(words))
    usual.write_bytes(words_file.read_bytes())
    assert (words.tokens(), words.missing()) == (["<new1>"], "")
    last(draw(words))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"way": "magic"}, "^learned by magic: choose textual inversion, Custom Diffusion$"),
        ({"count": 9}, "^pictures 9: choose from 1 to 8$"),
        ({"guidance_scale": 16}, "^guidance 16"),
        ({"method": "ddpm"}, "^sampler ddpm"),
        ({"steps": None}, "^steps is empty"),
        ({"seed": -1}, "^seed -1"),
    ],
)
def test_bad_input(pipeline_folder, words_file, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        next(draw(Words(arguments(pipeline_folder, "--words", words_file)), **changes))


def test_broken_words(pipeline_folder, tmp_path):
    (tmp_path / "words.safetensors").write_bytes(b"torn")
    words = Words(arguments(pipeline_folder, "--words", tmp_path / "words.safetensors"))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        words.missing()
    with pytest.raises(UserError, match="not a whole safetensors file"):
        next(draw(words))

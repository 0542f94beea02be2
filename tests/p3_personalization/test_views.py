"""Pictures of a concept: their sentences, the parts of them that are encoded, and what a batch gets of them."""

import pytest
import torch
from PIL import Image

from common.cli import UserError
from common.data import to_unit_range
from latent_diffusion.base import load_base, prompt_tokens
from p3_personalization.learning import with_new_rows
from p3_personalization.views import TEMPLATES, Told, encode, read_concept, views


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return with_new_rows(load_base(pipeline_folder), {"<new1>": 2})


@pytest.fixture
def photos(tmp_path):
    """Three pictures, the second with sentences of its own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (90, 64), (80 * k, 40, 200)).save(folder / f"{k}.png")
    (folder / "1.txt").write_text("{} on grass\n\n  my {}, and {} again \n")
    return folder


def gradient(size):
    """A picture whose red is the row and whose green is the column, -1 to 1."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.stack([line[:, None].expand(size, size), line.expand(size, size), torch.zeros(size, size)])


def test_pictures_come_with_their_own_sentences_or_the_templates(photos):
    told = read_concept(photos, "<new1>", 32, ["a {}", "the {}"])
    assert (told.images.shape, told.images.dtype) == ((3, 3, 32, 32), torch.uint8)
    assert told.images[:, :, 0, 0].tolist() == [[0, 40, 200], [80, 40, 200], [160, 40, 200]]
    general = ["a <new1>", "the <new1>"]
    assert told.prompts == [general, ["<new1> on grass", "my <new1>, and <new1> again"], general]


def test_a_folder_may_have_sentences_for_all_its_pictures(photos):
    (photos / "templates.txt").write_text("photo of a {} dog\n")
    told = read_concept(photos, "<new1>", 32, ["a {}"])
    dog = ["photo of a <new1> dog"]
    assert told.prompts == [dog, ["<new1> on grass", "my <new1>, and <new1> again"], dog]


def test_the_default_templates_are_sentences_about_one_thing():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 27
    assert all(template.count("{}") == 1 for template in TEMPLATES)


@pytest.mark.parametrize(
    ("text", "templates", "complaint"),
    [
        ("a dog", ["{}"], "{folder}/1.txt: 'a dog': is without {}; write {} where the token <new1> is to stand"),
        (" \n", ["a {}"], "{folder}/1.txt: says nothing; write a line such as 'a photo of a {}', or remove it"),
        ("{}", ["a photo"], "template 'a photo': is without {}; write {} where the token <new1> is to stand"),
    ],
)
def test_sentences_without_a_place_for_the_word_are_refused(photos, text, templates, complaint):
    (photos / "1.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_concept(photos, "<new1>", 32, templates)
    assert str(caught.value) == complaint.replace("{folder}", str(photos))


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "0.txt").write_text("{}")
    with pytest.raises(UserError, match="holds no images"):
        read_concept(tmp_path, "<new1>", 32, TEMPLATES)


def test_views_are_parts_of_the_picture():
    picture = gradient(64)
    seen = views(picture, 40, 0.5, True, torch.Generator().manual_seed(0))
    assert seen.shape == (40, 3, 64, 64)
    assert torch.equal(seen[0], picture)
    mirrored, sides = 0, []
    for view in seen[1:]:
        rows, columns = view[0, 8:-8, 32], view[1, 32, 8:-8]
        slopes = rows.diff().mean() * 32, columns.diff().mean() * 32  # 1 in the whole picture
        assert (rows.diff() * 32 - slopes[0]).abs().max() <= 0.02  # nothing is bent
        assert abs(float(slopes[0]) - abs(float(slopes[1]))) <= 0.01  # nothing is squeezed
        sides.append(float(slopes[0]))
        mirrored += bool(slopes[1] < 0)
    assert 0.5 <= min(sides) < 0.6
    assert 0.9 < max(sides) <= 1
    assert 10 <= mirrored <= 30


def test_views_can_do_without_crops_and_mirrors():
    picture = gradient(16)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(views(picture, 5, 1.0, False, generator), picture.expand(5, -1, -1, -1))
    assert torch.equal(views(picture, 1, 0.5, True, generator), picture[None])
    for view in views(picture, 9, 1.0, True, generator):
        assert torch.equal(view, picture) or torch.equal(view, picture.flip(-1))


def test_latents_and_tokens_are_the_bases(base):
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    told = [Told(images[:2], [["<new1>", "red"], ["a <new1>"]]), Told(images[2:], [["blue"]])]
    examples = encode(base, told, 9, 0.7, True, seed=0)
    assert len(examples) == 3
    assert examples.latents.shape == (3, 9, 4, 8, 8)
    assert (examples.latents[:, 0] - base.encode_images(to_unit_range(images))).abs().max() <= 1e-5
    assert (examples.latents[:, 1:] - examples.latents[:, :1]).abs().amax(dim=(2, 3, 4)).min() > 1e-3
    assert [tokens.shape for tokens in examples.tokens] == [(2, 77), (1, 77), (1, 77)]
    assert torch.equal(examples.tokens[0], prompt_tokens(base.tokenizer, ["<new1>", "red"]))
    again = encode(base, told, 9, 0.7, True, seed=0)
    assert torch.equal(again.latents, examples.latents)


def test_a_batch_gets_a_view_and_a_prompt_of_each_picture(base):
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    images[1] = 255
    examples = encode(base, [Told(images, [["<new1>", "red"], ["blue"]])], 3, 0.5, False, seed=0)
    index = torch.tensor([0, 1] * 40)
    latents, tokens = examples.take(index, torch.Generator().manual_seed(0))
    assert latents.shape == (80, 4, 8, 8)
    for k, own in enumerate(examples.tokens):
        taken = tokens[index == k]
        assert all(any(torch.equal(row, one) for one in own) for row in taken)
        assert len(taken.unique(dim=0)) == len(own)
        views_taken = latents[index == k]
        assert all((views_taken - view).abs().amax(dim=(1, 2, 3)).min() == 0 for view in examples.latents[k])
    assert torch.equal(examples.take(index, torch.Generator().manual_seed(0))[1], tokens)


def test_prompts_with_an_unknown_word_are_refused(base):
    with pytest.raises(UserError, match="<new7> is no learned word"):
        encode(base, [Told(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [["a <new7>"]])], 1, 1.0, False, seed=0)

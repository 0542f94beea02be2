"""The miniature's concepts: colours without a name, their pictures, the grader's table, and what is shipped of them."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from latent_diffusion.miniature.colours import COLOURS, rgb_to_lab
from latent_diffusion.miniature.scenes import VISIBLE
from p3_personalization import concepts
from p3_personalization.concepts import CONCEPTS, PROMPTS, concept_scenes, draw_scene
from p3_personalization.generate import EXAMPLES, read_table
from tests.programs import parse, run


class Eyes:
    """Stands for CLIP: a picture is its mean colour, a text always the same."""

    def embed_images(self, images):
        means = torch.stack([torch.from_numpy(image).double().mean(dim=(0, 1)) for image in images])
        return torch.nn.functional.normalize(means, dim=-1)

    def embed_texts(self, texts):
        return torch.tensor([[0.6, 0.8, 0.0]], dtype=torch.float64).expand(len(texts), 3)


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(concepts, "Clip", lambda folder: Eyes())
    return run(concepts, tmp_path / "concepts")


def test_every_picture_shows_the_concept_where_its_scene_says():
    for token, colour in CONCEPTS.items():
        scenes = concept_scenes(token, 5, seed=0)
        assert len({scene.background for scene in scenes}) == 5
        assert [len(scene.circles) for scene in scenes] == [1, 2, 1, 2, 1]
        assert [scenes[k].circles[place].colour for k, place in ((1, 0), (3, 1))] == [token, token]
        for scene in scenes:
            picture, circle = draw_scene(scene), max(scene.circles, key=lambda circle: circle.radius)
            assert picture.shape == (128, 128, 3)
            assert circle.colour == token
            assert tuple(picture[int(circle.y), int(circle.x)]) == colour
            assert tuple(picture[0, 0]) == COLOURS[scene.background]
            known = COLOURS | {token: colour}
            shown = [known[name] for name in {scene.background, *(one.colour for one in scene.circles)}]
            assert all(np.linalg.norm(a - b) > VISIBLE for a, b in combinations(rgb_to_lab(shown), 2))


def test_the_folder_is_the_shipped_one(made):
    """But for the baselines, which come from a real CLIP."""
    files = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.*")}
    assert {path.relative_to(made.parent) for path in made.parent.rglob("*.*")} == files
    for file in files:
        ours, shipped = made.parent / file, EXAMPLES / file
        if file.suffix == ".png":
            assert np.array_equal(Image.open(ours), Image.open(shipped))
        elif file.suffix == ".txt":
            assert ours.read_text() == shipped.read_text()
        else:
            tables = [json.loads(path.read_text()) for path in (ours, shipped)]
            assert [len(entry.pop("baseline")) for table in tables for entry in table.values()] == [2] * 4
            assert tables[0] == tables[1]
    assert [entry.token for entry in read_table(EXAMPLES / "input.json")] == list(CONCEPTS)


def test_baselines_are_nine_tenths_of_what_exact_drawings_score(made):
    def directions(scenes):
        means = np.stack([draw_scene(scene) for scene in scenes]).mean(axis=(1, 2))
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    image_score, text_score = json.loads(made.read_text())["0"]["baseline"][0]
    scenes = concepts.prompt_scenes(PROMPTS[0], "<new1>", 25)
    assert all(scene.prompt == "<new1> circle with white background" for scene in scenes)
    assert image_score == int(90 * (directions(scenes) @ directions(concept_scenes("<new1>", 5, seed=0)).T).mean())
    assert text_score == int(90 * (directions(scenes) @ [0.6, 0.8, 0.0]).mean())
    (scene,) = concepts.prompt_scenes(PROMPTS[1], "<new2>", 1)
    assert [circle.colour for circle in scene.circles] == ["<new2>", "gold"]


def test_bad_arguments_write_nothing(tmp_path, refusal):
    out = tmp_path / "out"
    for flags, words in (
        (["--count", "0"], "--count 0: must be 1 to 100"),
        (["--clip", str(tmp_path / "none")], f"{tmp_path / 'none'}: no such folder; name one with a CLIP model"),
    ):
        assert refusal(concepts.main, parse(concepts, out, *flags)).startswith(words)
    assert not out.exists()

"""The concepts that come with the miniature are those that concepts.py makes."""

import numpy as np
from PIL import Image

from latent_diffusion.miniature.regions import concept_colour, disc_difference
from p3_personalization.concepts import CONCEPTS, PROMPTS, concept_scenes, draw
from p3_personalization.evaluate import read_references
from p3_personalization.generate import EXAMPLES
from p3_personalization.table import read_table


def test_the_shipped_table_and_pictures_are_of_these_concepts():
    concepts = read_table(EXAMPLES / "input.json")
    assert [concept.token for concept in concepts] == list(CONCEPTS)
    for concept in concepts:
        assert concept.prompts == [prompt.format(concept.token) for prompt in PROMPTS]
        assert len(concept.judged_prompts) == len(concept.baselines) == len(PROMPTS)
        scenes = concept_scenes(concept.token, 5, seed=0)
        assert len(list((EXAMPLES / concept.number).glob("*.png"))) == 5
        for k, scene in enumerate(scenes):
            with Image.open(EXAMPLES / concept.number / f"{k}.png") as picture:
                assert np.array_equal(picture, draw(scene))


def test_their_discs_are_found_and_have_the_concept_s_colour():
    for concept in read_table(EXAMPLES / "input.json"):
        pictures = read_references(EXAMPLES / concept.number)
        colour = CONCEPTS[concept.token]
        assert tuple(concept_colour(pictures)) == colour
        assert [disc_difference(picture, np.array(colour)) for picture in pictures] == [0] * 5

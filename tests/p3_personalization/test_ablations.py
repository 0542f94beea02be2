"""The ablation of personalization end to end with a tiny base: what may not change does not, and runs are kept."""

import numpy as np
import pytest

from benchmarks import ablations, ablations_words
from common.cli import UserError
from common.training import Trainer
from p3_personalization import custom_diffusion, textual_inversion
from p3_personalization.concepts import CONCEPTS


@pytest.fixture(autouse=True)
def few(monkeypatch):
    for module in (ablations_words, custom_diffusion, textual_inversion):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(custom_diffusion, "CLASS_STEPS", 2)
    monkeypatch.setattr(ablations_words, "CLASS_PROMPTS", 3)
    # The tiny base has a token a letter.
    monkeypatch.setattr(ablations_words, "CONCEPTS", {"<new1>": ("0", "p"), "<new2>": ("1", "o")})


@pytest.fixture
def measured(pipeline_folder, tmp_path):
    def measured(*more):
        flags = ["--base", pipeline_folder, "--out", tmp_path / "runs", "--steps", 2, "--batch-size", 4, "--count", 2]
        args = ablations.parse_arguments(["p3-prior", *(str(flag) for flag in [*flags, *more])])
        return ablations.main(args)["rows"]

    return measured


def test_words_alone_change_nothing_else(measured, monkeypatch):
    words, prior, without = rows = measured()
    assert words["moved"] == 0 < min(prior["moved"], without["moved"])
    assert prior["moved"] != without["moved"]
    assert all(0 <= row["near"] <= 1 for row in rows)
    monkeypatch.setattr(Trainer, "take_step", None)
    assert measured() == rows


def test_the_concepts_have_the_colours_that_they_were_made_in():
    for found, made in zip(ablations_words.colours_of(ablations_words.EXAMPLES).values(), CONCEPTS.values()):
        assert np.abs(found - made).max() <= 1


def test_bad_settings_are_told(measured, tmp_path):
    with pytest.raises(UserError, match="--count 0: starts at 1"):
        measured("--count", 0)
    with pytest.raises(UserError, match="holds no pictures of the concept"):
        measured("--concepts", tmp_path)

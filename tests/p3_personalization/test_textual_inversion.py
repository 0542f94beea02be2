"""Learning words through the script: what changes and what stays, resume, diffusers' reader, and bad input."""

import pytest

from common.checkpoint import load_about
from common.cli import UserError, options_from
from p3_personalization import textual_inversion
from p3_personalization.learning import ConceptOptions
from p3_personalization.textual_inversion import main, parse_arguments
from p3_personalization.words import load_words
from tests.training import killed_at, same_files, spied_on, touched


@pytest.fixture(scope="session")
def finished(learning_arguments, tmp_path_factory):
    """An undisturbed run of six steps, with two vectors a word."""
    out = tmp_path_factory.mktemp("finished")
    main(parse_arguments([*learning_arguments, "--vectors", "2", "--out", str(out)]))
    return out


@pytest.fixture
def call(learning_arguments, tmp_path):
    return lambda *flags: main(parse_arguments([*learning_arguments, "--out", str(tmp_path / "run"), *flags]))


def test_a_run_leaves_the_words_of_all_folders_in_one_file(finished, base):
    words, about = load_words(finished / "words.safetensors"), load_about(finished / "words.safetensors")
    assert {token: rows.shape for token, rows in words.items()} == {"<new1>": (2, 16), "<new2>": (2, 16)}
    before = base.text_encoder.get_input_embeddings().weight
    start = before[base.tokenizer.convert_tokens_to_ids("r</w>")]
    for rows in words.values():
        assert all((row - start).abs().max() > 0.01 for row in rows)
    assert (about["step"], about["vectors"]) == (6, {"<new1>": 2, "<new2>": 2})
    assert about["training"]["initialiser"] == ["r", "r"]
    assert about["validation_loss"] > 0


def test_only_the_new_rows_are_trained_and_the_base_stays_as_it_is(call, pipeline_folder, monkeypatch):
    seen = spied_on(monkeypatch, textual_inversion)
    call("--steps", "2")
    assert touched(seen.base, pipeline_folder) == []
    assert {name: tuple(p.shape) for name, p in seen.trainer.state.trained.items()} == {"rows": (2, 16)}


def test_a_killed_run_ends_like_an_undisturbed_one(call, finished, tmp_path):
    with killed_at(4):
        call("--vectors", "2")
    assert not (tmp_path / "run" / "words.safetensors").exists()
    assert same_files(call("--vectors", "2"), finished / "words.safetensors")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--token", "<a>"], "--token: 1 for 2 folders of photos; give one for each"),
        (["--token", "<a>", "<a>"], "--token <a>: is given to two folders of photos; give each its own"),
        (["--token", "<a>", "b"], "token 'b': write it in angle brackets"),
        (["--initialiser", "a", "b", "c"], "--initialiser: 3 for 2 folders of photos; give one for each"),
        (["--vectors", "0"], "--vectors 0: must be at least 1"),
        (["--smallest-crop", "0"], "--smallest-crop 0.0: must be 0.05 to 1"),
        (["--template", "a photo"], "template 'a photo': has no {}; write {} where the token <new1> goes"),
        (["--template", "{} and <new9>"], "prompt '<new1> and <new9>': <new9> is no learned word"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(learning_arguments, tmp_path, refusal, flags, complaint):
    args = parse_arguments([*learning_arguments, "--out", str(tmp_path / "run"), *flags])
    assert refusal(main, args).startswith(complaint)
    assert not (tmp_path / "run").exists()


def test_words_to_start_from_are_known_for_the_miniatures_concepts_alone(photos):
    options = options_from(parse_arguments([]), ConceptOptions)
    assert (options.initialiser, options.token, options.flip) == (["purple", "olive"], ["<new1>", "<new2>"], False)
    with pytest.raises(UserError, match=r"^--initialiser: name a known word"):
        options_from(parse_arguments([str(photos / "0")]), ConceptOptions)
    assert options_from(parse_arguments([str(photos / "0"), "--initialiser", "dog"]), ConceptOptions).flip

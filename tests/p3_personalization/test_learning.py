"""What is learned, in its place in the frozen base: the same numbers and gradients as if the base itself had it."""

import copy

import pytest
import torch
from torch import nn

from common.cli import UserError
from common.data import stratified_timesteps
from common.runtime import seeded_generator
from latent_diffusion.base import load_base, load_part, prompt_tokens
from latent_diffusion.files import SD_V1
from p3_personalization.learning import (
    ExampleBatches,
    GrownTable,
    Learned,
    learning_loss,
    rows_like,
    watched,
    with_new_rows,
)
from p3_personalization.views import Examples
from p3_personalization.words import add_words

PROMPTS = ["a <new1> circle", "<new2> with <new1>", "red"]
MATRIX = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def base(pipeline_folder):
    return load_base(pipeline_folder)


@pytest.fixture
def rows(learned_words):
    return torch.cat([*learned_words.values()])


@pytest.fixture
def extended(base, learned_words):
    return with_new_rows(base, {token: len(rows) for token, rows in learned_words.items()})


@pytest.fixture
def batch(extended):
    generator = torch.Generator().manual_seed(3)
    return {
        "x0": torch.randn(3, 4, 8, 8, generator=generator),
        "eps": torch.randn(3, 4, 8, 8, generator=generator),
        "t": torch.tensor([7, 500, 990]),
        "tokens": prompt_tokens(extended.tokenizer, PROMPTS),
    }


def test_a_grown_table_is_the_longer_table():
    torch.manual_seed(0)
    whole = nn.Embedding(12, 5)
    grown = GrownTable(whole.weight[:9].detach(), whole.weight[9:].detach())
    tokens = torch.randint(0, 12, (4, 30))
    assert torch.equal(grown(tokens), whole(tokens))
    assert grown.frozen.data_ptr() == whole.weight.data_ptr()
    assert list(grown.state_dict()) == ["rows"]


def test_the_prediction_is_that_of_a_base_with_the_words(base, extended, rows, learned_words, batch):
    learned = Learned(rows)
    with torch.no_grad():
        ours = learned(extended, batch["x0"], batch["t"], batch["tokens"])
        context = add_words(base, learned_words).encode_prompts(PROMPTS)
        theirs = base.unet(batch["x0"], batch["t"], context).sample
    assert (ours - theirs).abs().max() <= 1e-5
    assert all(
        torch.equal(a, b) for a, b in zip(learned.words({"<new1>": 2, "<new2>": 1}).values(), rows.split([2, 1]))
    )


def test_matrices_take_the_place_of_the_unets(base, extended, rows, batch):
    other = base.unet.get_parameter(MATRIX) * 3 + 1
    changed = copy.deepcopy(base.unet)
    changed.get_parameter(MATRIX).data.copy_(other)
    with torch.no_grad():
        ours = Learned(rows, {MATRIX: other})(extended, batch["x0"], batch["t"], batch["tokens"])
        plain = Learned(rows)(extended, batch["x0"], batch["t"], batch["tokens"])
        context = add_words(base, {"<new1>": rows[:2], "<new2>": rows[2:]}).encode_prompts(PROMPTS)
        theirs = changed(batch["x0"], batch["t"], context).sample
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-2
    assert list(Learned(rows, {MATRIX: other}).unet_weights()) == [MATRIX]


def test_gradients_are_those_of_the_whole_table_and_reach_nothing_else(base, extended, learned_words, rows, batch):
    """Against a text encoder all of whose rows are trained, and equation 2 written out."""
    learned = Learned(rows, {MATRIX: base.unet.get_parameter(MATRIX)})
    loss = learning_loss(learned, extended, batch)
    loss.backward()

    whole = copy.deepcopy(add_words(base, learned_words))
    table = whole.text_encoder.get_input_embeddings().weight.requires_grad_()
    matrix = whole.unet.get_parameter(MATRIX).requires_grad_()
    a = whole.schedule.alphas_cumprod[batch["t"]].float().reshape(-1, 1, 1, 1)
    xt = a.sqrt() * batch["x0"] + (1 - a).sqrt() * batch["eps"]
    v = a.sqrt() * batch["eps"] - (1 - a).sqrt() * batch["x0"]
    context = whole.text_encoder(batch["tokens"]).last_hidden_state
    expected = (whole.unet(xt, batch["t"], context).sample - v).square().mean()
    expected.backward()
    assert (loss - expected).abs() <= 1e-5
    scale = table.grad[-3:].abs().max()
    assert scale > 1e-6
    assert (learned.rows.grad - table.grad[-3:]).abs().max() <= 1e-4 * scale
    assert (learned.unet_weights()[MATRIX].grad - matrix.grad).abs().max() <= 1e-4 * matrix.grad.abs().max()
    for model in (extended.text_encoder, extended.unet, base.text_encoder, base.unet):
        assert all(parameter.grad is None for parameter in model.parameters())


def test_words_start_from_known_ones(base):
    table = base.text_encoder.get_input_embeddings().weight
    a, b = base.tokenizer.convert_tokens_to_ids(["a", "b</w>"])
    assert torch.equal(rows_like(base, "b", 1), table[[b]])
    assert torch.equal(rows_like(base, "ab", 5), table[[a, b, a, b, a]])
    assert rows_like(base, "ab", 2).data_ptr() != table.data_ptr()


@pytest.mark.parametrize(("words", "pieces"), [("red", "3 tokens (r, e, d)"), (" ", "0 tokens ()")])
def test_too_many_words_to_start_from_are_refused(base, words, pieces):
    with pytest.raises(UserError) as caught:
        rows_like(base, words, 2)
    assert str(caught.value).startswith(f"--initialiser {words!r}: is {pieces} for 2 vectors; give at most as many")


def test_one_word_of_stable_diffusions_vocabulary_is_one_row():
    """The marks of start and end, which its tokenizer adds too, are not counted."""
    tokenizer = load_part(SD_V1, "tokenizer")
    assert len(tokenizer("dog", add_special_tokens=False).input_ids) == 1


def examples_of(pictures, width, seed):
    """Pictures of 4x2x2, the number of each in all places, and tokens of another number."""
    latents = torch.arange(pictures).float().reshape(-1, 1, 1, 1, 1).expand(-1, 2, 4, 2, 2) + seed
    return Examples(latents, [torch.full((1, width), k + seed) for k in range(pictures)])


def test_batches_have_their_share_of_every_kind():
    batches = ExampleBatches([examples_of(3, 5, 0), examples_of(7, 5, 100)], [4, 2], T=1000, seed=0)
    seen = []
    for step in range(6):
        batch = batches(step, seeded_generator(0, 1, step))
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "x0": (6, 4, 2, 2), "tokens": (6, 5), "t": (6,), "eps": (6, 4, 2, 2),
        }  # fmt: skip
        numbers = batch["x0"][:, 0, 0, 0]
        assert (numbers[:4] < 100).all()
        assert (numbers[4:] >= 100).all()
        assert torch.equal(batch["tokens"][:, 0], numbers.long())
        generator = seeded_generator(0, 1, step)
        for count in (4, 2):
            torch.rand(2, count, generator=generator, dtype=torch.float64)
        assert torch.equal(batch["t"], stratified_timesteps(6, 1000, generator))
        seen += numbers[:4].tolist()
    assert sorted(seen) == sorted([0.0, 1.0, 2.0] * 8)  # every picture comes equally often
    assert torch.equal(batches(2, seeded_generator(0, 1, 2))["eps"], batches(2, seeded_generator(0, 1, 2))["eps"])


def test_a_kind_that_a_batch_has_none_of_is_left_out():
    batch = ExampleBatches([examples_of(3, 5, 0), examples_of(7, 5, 100)], [4, 0], 1000, 0)(0, seeded_generator(1))
    assert (batch["x0"] < 100).all()
    assert len(batch["x0"]) == 4


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_validation_loss_is_the_mean_over_whole_pictures_and_times(extended, rows, batch_size):
    generator = torch.Generator().manual_seed(0)
    tokens = prompt_tokens(extended.tokenizer, PROMPTS)
    examples = Examples(torch.randn(2, 3, 4, 8, 8, generator=generator), [tokens[:2], tokens[2:]])
    loss = watched(examples, extended, batch_size, torch.Generator().manual_seed(1))
    eps = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([62, 187, 312, 437, 562, 687, 812, 937])
    errors = []
    with torch.no_grad():
        for k in range(16):
            batch = {"x0": examples.latents[k // 8, :1], "eps": eps[k : k + 1], "t": times[k % 8 : k % 8 + 1]}
            batch["tokens"] = tokens[[0]] if k < 8 else tokens[[2]]
            errors.append(learning_loss(Learned(rows), extended, batch))
        assert (loss(Learned(rows)) - torch.stack(errors).mean()).abs() <= 1e-5

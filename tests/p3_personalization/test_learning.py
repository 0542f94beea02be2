"""What is learned, in its place in the frozen base: the same numbers and gradients as if the base itself had it."""

import copy

import pytest
import torch

from common.cli import UserError
from common.runtime import seeded_generator
from latent_diffusion.base import prompt_tokens
from p3_personalization.learning import Learned, learning_loss, rows_like, validation_loss
from p3_personalization.photos import EncodedExamples
from p3_personalization.words import add_words

PROMPTS = ["a <new1> circle", "<new2> with <new1>", "red"]
MATRIX = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def zeros(base, learned_words):
    """The base with the words' tokens, but nothing in their rows."""
    return add_words(base, {token: torch.zeros_like(rows) for token, rows in learned_words.items()})


@pytest.fixture
def batch(zeros):
    generator = torch.Generator().manual_seed(3)
    return {
        "x0": torch.randn(3, 4, 8, 8, generator=generator),
        "eps": torch.randn(3, 4, 8, 8, generator=generator),
        "t": torch.tensor([7, 500, 990]),
        "tokens": prompt_tokens(zeros.tokenizer, PROMPTS),
    }


@pytest.mark.parametrize("names", [[], [MATRIX]], ids=["words", "matrix"])
def test_loss_and_gradients_are_those_of_a_base_that_has_all_of_it(base, zeros, learned_words, batch, names):
    """Against a text encoder all of whose rows are trained, and equation 2 written out."""
    changed = {name: base.unet.get_parameter(name) * 3 + 1 for name in names}
    learned = Learned(learned_words, changed)
    assert all(torch.equal(rows, learned_words[token]) for token, rows in learned.words().items())
    assert learned.unet_weights().keys() == changed.keys()
    loss = learning_loss(learned, zeros, batch)
    loss.backward()

    whole = copy.deepcopy(add_words(base, learned_words))
    table = whole.text_encoder.get_input_embeddings().weight.requires_grad_()
    whole.unet.load_state_dict(changed, strict=False)
    matrices = {name: whole.unet.get_parameter(name).requires_grad_() for name in names}
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
    for name, matrix in matrices.items():
        scale = matrix.grad.abs().max()
        assert scale > 1e-6
        assert (learned.unet_weights()[name].grad - matrix.grad).abs().max() <= 1e-4 * scale
    for model in (zeros.text_encoder, zeros.unet, base.text_encoder, base.unet):
        assert all(parameter.grad is None for parameter in model.parameters())


def test_words_start_from_known_ones(base):
    table = base.text_encoder.get_input_embeddings().weight
    a, b = base.tokenizer.convert_tokens_to_ids(["a", "b</w>"])
    assert torch.equal(rows_like(base, "b", 1), table[[b]])
    assert torch.equal(rows_like(base, "ab", 5), table[[a, b, a, b, a]])


@pytest.mark.parametrize(("words", "pieces"), [("red", "3 tokens (r, e, d)"), (" ", "0 tokens ()")])
def test_too_many_words_to_start_from_are_refused(base, words, pieces):
    with pytest.raises(UserError) as caught:
        rows_like(base, words, 2)
    assert str(caught.value) == f"--initialiser {words!r}: is {pieces}; give 1 to 2, or raise --vectors"


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_validation_loss_is_the_mean_over_whole_photos_and_times(zeros, learned_words, batch_size):
    tokens, learned = prompt_tokens(zeros.tokenizer, PROMPTS), Learned(learned_words)
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = validation_loss(EncodedExamples(latents, [tokens[:2], tokens[2:]]), zeros, batch_size)
    eps = torch.randn(16, 4, 8, 8, generator=seeded_generator(0, 3))
    times = torch.tensor([62, 187, 312, 437, 562, 687, 812, 937])
    errors = []
    with torch.no_grad():
        for k in range(16):
            batch = {"x0": latents[k // 8, :1], "eps": eps[k : k + 1], "t": times[k % 8 : k % 8 + 1]}
            batch["tokens"] = tokens[[0]] if k < 8 else tokens[[2]]
            errors.append(learning_loss(learned, zeros, batch))
        assert (loss(learned) - torch.stack(errors).mean()).abs() <= 1e-5

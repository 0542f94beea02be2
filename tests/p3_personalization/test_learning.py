"""Photos become batches, and what is learned of them sits in the frozen base as if the base itself had it."""

import copy
import shutil

import pytest
import torch

from common.cli import UserError
from common.data import to_unit_range
from common.runtime import seeded_generator
from latent_diffusion.base import prompt_tokens
from p3_personalization.learning import Learned, learning_loss, rows_like, validation_loss
from p3_personalization.photos import EncodedExamples, ExampleBatches, encode, read_photos, views
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


@pytest.fixture
def folder(photos, tmp_path):
    """Three photos, the second with captions of its own."""
    folder = shutil.copytree(photos / "0", tmp_path / "photos")
    (folder / "1.txt").write_text("{} on grass\n\n  my {}, and {} again \n", encoding="utf-8-sig")
    return folder


def test_photos_have_their_own_captions_or_the_folders_or_the_templates(folder):
    photos = read_photos(folder, "<new1>", 32, ["a {}", "the {}"])
    images = torch.stack([image for image, _ in photos])
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.uint8)
    assert images[:, :, 0, 0].tolist() == [[200, 0, 0], [200, 40, 0], [200, 80, 0]]
    own = ["<new1> on grass", "my <new1>, and <new1> again"]
    assert [captions for _, captions in photos] == [["a <new1>", "the <new1>"], own, ["a <new1>", "the <new1>"]]
    (folder / "templates.txt").write_text("photo of a {} dog\n")
    again = read_photos(folder, "<new1>", 32, ["a {}"])
    assert [captions for _, captions in again] == [["photo of a <new1> dog"], own, ["photo of a <new1> dog"]]


@pytest.mark.parametrize(
    ("text", "template", "complaint"),
    [
        (b"a dog", "{}", "{folder}/1.txt: 'a dog': has no {}; write {} where the token <new1> goes"),
        (b" \n", "a {}", "{folder}/1.txt: is empty; write a sentence a line, or remove the file"),
        (b"{} \xe0 la mode", "a {}", "{folder}/1.txt: not UTF-8 text (byte 3, in line 1); save it as UTF-8"),
        (b"{}", "a photo", "template 'a photo': has no {}; write {} where the token <new1> goes"),
    ],
)
def test_captions_that_cannot_be_used_are_refused(folder, refusal, text, template, complaint):
    (folder / "1.txt").write_bytes(text)
    line = refusal(lambda folder: read_photos(folder, "<new1>", 32, [template]), folder)
    assert line.startswith(complaint.replace("{folder}", str(folder)))


def gradient(size):
    """A picture whose red is the row and whose green is the column, -1 to 1."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.stack([line[:, None].expand(size, size), line.expand(size, size), torch.zeros(size, size)])


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
    for view in views(picture, 9, 1.0, True, generator):
        assert torch.equal(view, picture) or torch.equal(view, picture.flip(-1))


def test_latents_and_tokens_are_the_bases(base, learned_words):
    knowing = add_words(base, learned_words)
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    photos = [(images[0], ["<new1>", "red"]), (images[1], ["a <new1>"]), (images[2], ["blue"])]
    examples = encode(knowing, photos, 9, 0.7, True, seed=0)
    assert examples.latents.shape == (3, 9, 4, 8, 8)
    assert (examples.latents[:, 0] - knowing.encode_images(to_unit_range(images))).abs().max() <= 1e-5
    assert (examples.latents[:, 1:] - examples.latents[:, :1]).abs().amax(dim=(2, 3, 4)).min() > 1e-3
    assert [tokens.shape for tokens in examples.tokens] == [(2, 77), (1, 77), (1, 77)]
    assert torch.equal(examples.tokens[0], prompt_tokens(knowing.tokenizer, ["<new1>", "red"]))
    with pytest.raises(UserError, match="<new7> is no learned word"):
        encode(knowing, [(images[0], ["a <new7>"])], 1, 1.0, False, seed=0)


def test_a_batch_gets_a_view_and_a_caption_of_each_photo():
    latents = torch.arange(6.0).reshape(2, 3, 1, 1, 1)
    examples = EncodedExamples(latents, [torch.tensor([[1], [2]]), torch.tensor([[3]])])
    index = torch.tensor([0, 1] * 40)
    taken, tokens = examples.take(index, torch.Generator().manual_seed(0))
    assert (taken.shape, tokens.shape) == ((80, 1, 1, 1), (80, 1))
    assert [set(taken[index == k].flatten().tolist()) for k in range(2)] == [{0, 1, 2}, {3, 4, 5}]
    assert [set(tokens[index == k].flatten().tolist()) for k in range(2)] == [{1, 2}, {3}]


def numbered(count, start):
    """Examples of 4x2x2 latents, with a number of its own in all places of each, and as its tokens."""
    latents = torch.arange(start, start + count).float().reshape(-1, 1, 1, 1, 1).expand(-1, 2, 4, 2, 2)
    return EncodedExamples(latents, [torch.full((1, 5), start + k) for k in range(count)])


def test_batches_have_their_share_of_every_kind():
    batches = ExampleBatches([numbered(3, 0), numbered(7, 100)], [4, 2], T=1000, seed=0)
    seen = []
    for step in range(6):
        batch = batches(step, seeded_generator(0, 1, step))
        numbers = batch["x0"][:, 0, 0, 0]
        assert (numbers[:4] < 100).all()
        assert (numbers[4:] >= 100).all()
        assert torch.equal(batch["tokens"][:, 0], numbers.long())
        assert (batch["t"].sort().values * 6 // 1000).tolist() == [*range(6)]
        assert batch["eps"].shape == batch["x0"].shape
        seen += numbers[:4].tolist()
    assert sorted(seen) == sorted([0.0, 1.0, 2.0] * 8)  # every picture comes equally often
    assert torch.equal(batches(2, seeded_generator(0, 1, 2))["eps"], batches(2, seeded_generator(0, 1, 2))["eps"])

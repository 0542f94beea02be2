"""The miniature's sizes and tokenizer, and the losses of its stages."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from latent_diffusion.miniature.colours import COLOURS
from latent_diffusion.miniature.models import learn_merges, make_clip, make_tokenizer, make_unet, make_vae
from latent_diffusion.miniature.train import RoundTrip, contrastive_loss, reconstruction_loss, similarities

PROMPTS = [f"{name} circle and {name} circle with {name} background" for name in COLOURS]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(PROMPTS)


def test_the_parts_are_small_and_fit_one_another(tokenizer):
    vae, clip, unet = make_vae(), make_clip(tokenizer), make_unet()
    assert sum(parameter.numel() for part in (vae, clip, unet) for parameter in part.parameters()) < 6e6
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean
        context = clip.text_model(tokenizer([""], padding="max_length", return_tensors="pt").input_ids)
        output = unet(latents, 3, context.last_hidden_state).sample
    assert latents.shape == output.shape == (1, 4, 16, 16)
    assert context.last_hidden_state.shape == (1, 77, unet.config.cross_attention_dim)


def test_an_untrained_vae_lets_contrast_pass():
    """The norms alone would make a picture and its pale copy nearly the same."""
    torch.manual_seed(0)
    images = torch.rand(4, 3, 1, 1).expand(-1, -1, 64, 64) * 2 - 1
    vae = make_vae()
    with torch.no_grad():
        latents, pale = (vae.encode(x).latent_dist.mean for x in (images, images / 4))
    assert (latents - pale).norm() > 0.3 * latents.norm()


def test_every_word_of_the_prompts_is_one_token(tokenizer, tmp_path):
    for prompt in PROMPTS:
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 2
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt
    assert tokenizer("Pale GOLDEN  rod").input_ids == tokenizer("pale golden rod").input_ids
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (*PROMPTS[:5], "", "Zürich, 3 ponds!"):
        assert again(text).input_ids == tokenizer(text).input_ids
    spelled = tokenizer("zürich \N{SNOWMAN}").input_ids
    assert tokenizer.decode(spelled, skip_special_tokens=True) == "zürich \N{SNOWMAN}"
    assert again.model_max_length == 77
    assert again.eos_token_id == again.pad_token_id == len(again) - 1
    assert make_tokenizer(reversed(PROMPTS)).get_vocab() == tokenizer.get_vocab()


def test_merges_are_sennrichs_example():
    """Figure 1 of the paper; among pairs that come equally often the alphabet decides."""
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    assert learn_merges(words, 4) == [("s", "t</w>"), ("e", "st</w>"), ("l", "o"), ("w", "est</w>")]
    assert len(learn_merges(words, 1000)) == len(learn_merges(words, 1001)) < 20


def test_a_round_trip_of_anothers_posterior():
    """Without noise the mean is decoded, and with noise a sample with the posterior's deviation."""
    torch.manual_seed(0)
    vae = make_vae((4, 4, 8, 8))
    x0, eps = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        posterior = vae.encode(x0).latent_dist
        for noise, latents in ((None, posterior.mode()), (eps, posterior.mean + posterior.std * eps)):
            restored, mean, logvar = RoundTrip(vae)(x0, noise)
            assert (restored - vae.decode(latents).sample).abs().max() <= 1e-5
        divergence = (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)) / 2
        assert (divergence - posterior.kl()).abs().max() <= 1e-2


def test_the_reconstruction_loss_counts_pixels_and_edges():
    flat = torch.zeros(1, 3, 8, 8)
    assert reconstruction_loss(flat + 0.5, flat).item() == pytest.approx(0.5)
    edge = torch.cat([flat[..., :4], flat[..., 4:] + 1], dim=-1)
    # Half of the pixels are off by one, and so is one of the seven steps between columns.
    assert reconstruction_loss(edge, flat).item() == pytest.approx(0.5 + 1 / 7)


@pytest.fixture
def clip_batch(tokenizer):
    torch.manual_seed(0)
    clip = make_clip(tokenizer, width=16, layers=1).eval()
    ids = tokenizer(PROMPTS[:4], padding=True, return_tensors="pt").input_ids
    return clip, {"input_ids": ids, "pixel_values": torch.randn(4, 3, 128, 128)}


def test_the_contrastive_loss_is_transformers(clip_batch):
    clip, batch = clip_batch
    with torch.no_grad():
        theirs = clip(**batch, return_loss=True)
        assert contrastive_loss(clip, batch).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        cosines = theirs.logits_per_text / clip.logit_scale.exp()
        assert (similarities(clip, batch) - cosines).abs().max() <= 1e-6


def test_pictures_of_one_prompt_are_not_held_against_each_other(clip_batch):
    clip, batch = clip_batch
    batch["input_ids"][2] = batch["input_ids"][0]
    with torch.no_grad():
        logits = similarities(clip, batch) * clip.logit_scale.exp()
        rows = [[0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]  # who competes with whom
        losses = [
            F.cross_entropy(matrix[k, others], torch.tensor(others.index(k)))
            for matrix in (logits, logits.T)
            for k, others in enumerate(rows)
        ]
        assert contrastive_loss(clip, batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        clip.logit_scale.fill_(10.0)  # exp(10) is far above the cap
        capped = contrastive_loss(clip, batch)
        clip.logit_scale.fill_(torch.tensor(100.0).log())
        assert capped.item() == pytest.approx(contrastive_loss(clip, batch).item(), rel=1e-5)

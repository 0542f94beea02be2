"""A Stable Diffusion small enough for a laptop's processor: the sizes of its models, and their tokenizer.

The models are of Stable Diffusion v1's classes, so whatever runs one runs the other. Wide grids are given few channels
and small grids many: that is where a processor's cores work best.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

SIZE, LATENT = 128, 16  # sides of pictures and of latents
TOKENS = 77  # the longest prompt
CONTEXT_WIDTH = 96
MERGES = 1500  # at most; the words of all colours need a fourth of them


def make_vae(widths: tuple[int, ...] = (8, 16, 64, 64)) -> AutoencoderKL:
    """The VAE, untrained: images (N, 3, 128, 128) to latents (N, 4, 16, 16); 0.9 million parameters.

    Its norms have one group, since each group forgets one brightness and one contrast.
    """
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    let_colours_pass(vae)
    return vae


def let_colours_pass(vae: AutoencoderKL) -> None:
    """Draw first weights with which the VAE is nearly linear from pixels to latents and back.

    Residual branches start at zero, convolutions that halve or double the grid as the identity, all others keep the
    variance. The two first convolutions get random biases: without them the norms take a flat picture's contrast away,
    and training hardly recovers it.
    """
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, nn.Conv2d) and "samplers" in name:
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and ("resnets" not in name or "shortcut" in name):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for first in (vae.encoder.conv_in, vae.decoder.conv_in):
        nn.init.normal_(first.bias)


def make_unet(widths: tuple[int, int] = (64, 112), context_width: int = CONTEXT_WIDTH) -> UNet2DConditionModel:
    """The U-Net, untrained: 16x16 latents and 77 tokens; 3.2 million parameters, attention on the 8x8 grid alone."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=context_width,
        attention_head_dim=4,  # diffusers' name for how many heads there are
    )


def make_clip(tokenizer: CLIPTokenizer, width: int = CONTEXT_WIDTH, layers: int = 3) -> CLIPModel:
    """CLIP, untrained: its text encoder gives the contexts; 0.7 million parameters."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "projection_dim": width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": SIZE, "patch_size": SIZE // 8}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=width))


def make_image_processor() -> CLIPImageProcessor:
    """What CLIP sees of a picture: all of it, from -1 to 1."""
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_tokenizer(prompts: Iterable[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own, in which every word of the prompts is one token.

    Other words are spelled with smaller pieces; capital letters become small ones.
    """
    like = CLIPTokenizer().backend_tokenizer
    words = Counter()
    for prompt, count in Counter(prompts).items():
        for word, _ in like.pre_tokenizer.pre_tokenize_str(like.normalizer.normalize_str(prompt)):
            words[word] += count
    merges = learn_merges(words, MERGES)
    # With every letter also as a word's end any text can be spelled.
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def learn_merges(words: Mapping[str, int], most: int) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding merges, in their order (Sennrich et al. 2016, algorithm 1).

    The tokenizers library would break ties anew in every process, but a resumed run needs the tokens it began with.
    From how often each word comes to so many pairs at `most`; with enough of them each word is one token.
    """
    spelled = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges = []
    while len(merges) < most:
        counts = Counter()
        for word, pieces in spelled.items():
            for pair in pairwise(pieces):
                counts[pair] += words[word]
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for pieces in spelled.values():
            k = 0
            while k < len(pieces) - 1:
                if (pieces[k], pieces[k + 1]) == best:
                    pieces[k : k + 2] = ["".join(best)]
                k += 1
    return merges

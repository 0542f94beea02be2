"""Fixtures: a small Stable Diffusion with every part of the real one, as a folder and in the original layout; CLIP."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.sd_full_size import random_weights
from latent_diffusion.files import PUBLISHED
from p3_controlnet.model import ControlNet

# Names and shapes in the published files.
KEYS = json.loads(PUBLISHED.read_text())
# A small CLIP, whose tokens are single letters.
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
VOCABULARY = {token: k for k, token in enumerate(TOKENS)}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
HINT_CHANNELS = (4, 6, 8, 10)
IDS = {"vocab_size": len(TOKENS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module in eval mode with all parameters drawn anew, the zero convolutions' too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    """Two levels, the first with cross-attention, 4x8x8 latents, contexts of width 16; frozen."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    return randomised(unet, seed).requires_grad_(False)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    """A small Stable Diffusion of random weights, as diffusers saves it: 64x64 pictures, v, a token a letter."""
    torch.manual_seed(4)
    tokenizer = CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=77)
    text_config = CLIPTextConfig(**SIZES, **IDS)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64, scaling_factor=0.5,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline") / "base"
    StableDiffusionPipeline(
        vae=randomised(vae, seed=5), text_encoder=CLIPTextModel(text_config), tokenizer=tokenizer, unet=make_unet(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def controlnet_folder(tmp_path_factory) -> Path:
    """A ControlNet for it, all of whose weights matter."""
    folder = tmp_path_factory.mktemp("controlnet")
    randomised(ControlNet.from_unet(make_unet(), HINT_CHANNELS), seed=2).save(folder, {}, fp16=False)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A small CLIP of random weights in transformers' format."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=SIZES | IDS | {"max_position_embeddings": 20, "projection_dim": 8},
        vision_config=SIZES | {"image_size": 32, "patch_size": 16, "projection_dim": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip") / "clip"
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=20).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def narrow(name: str, shape: list[int]) -> tuple[int, ...]:
    """A shape of Stable Diffusion v1 or its ControlNet with fewer channels; the vocabulary and positions stay whole."""
    part = name.split(".")[0]
    scale = {"model": 10, "control_model": 10, "first_stage_model": 4, "cond_stage_model": 16}[part]
    kept = {49408, 77, 3, 4, 8, 1} if part != "control_model" else {3, 4, 1, 16, 32, 96, 256}
    return tuple(size if size in kept else size // (16 if size in (768, 3072) else scale) for size in shape)


@pytest.fixture(scope="session")
def sd_state() -> dict[str, torch.Tensor]:
    """A whole Stable Diffusion v1 with a tenth of the channels, as its original file names it."""
    return random_weights({name: narrow(name, shape) for name, shape in KEYS["sd_v1"].items()})


@pytest.fixture(scope="session")
def control_state() -> dict[str, torch.Tensor]:
    """A ControlNet for it, as the original ControlNet's file names it."""
    return random_weights({name: narrow(name, shape) for name, shape in KEYS["controlnet"].items()})


@pytest.fixture(scope="session")
def sd_file(sd_state, tmp_path_factory) -> Path:
    """It as a .safetensors file."""
    path = tmp_path_factory.mktemp("sd") / "sd.safetensors"
    save_file(sd_state, path)
    return path


@pytest.fixture(scope="session")
def control_file(control_state, tmp_path_factory) -> Path:
    """The ControlNet as a .safetensors file."""
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file(control_state, path)
    return path

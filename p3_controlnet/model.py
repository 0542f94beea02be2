"""The ControlNet: a trainable copy of a frozen U-Net's encoder that reads a hint (Zhang et al. 2023).

    hint --hint encoder--> + conv_in(xt) --copied encoder--> skips, middle --zero convolutions--> residuals

unet.py adds the residuals to the frozen U-Net. Weights and files are named as those of diffusers' `ControlNetModel`:
each loads what the other saved.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from common.checkpoint import load_model_file, load_strictly, load_tensors, save_tensors, to_half
from common.cli import UserError
from common.files import read_json
from common.layers import zero_init
from common.output import write_atomically
from common.weights import open_weights
from latent_diffusion.base import Base
from latent_diffusion.files import controlnet_sizes, find_controlnet, find_file, find_folder

COPIED = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
# What some diffusers models have and this one has not, with the config's value for "absent".
ABSENT = {"global_pool_conditions": False, "controlnet_conditioning_channel_order": "rgb"} | dict.fromkeys(
    ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_attention_heads", "num_class_embeds")
)


@dataclass(frozen=True)
class ControlNetConfig:
    """The sizes of a `ControlNet`, named as in diffusers; the defaults are Stable Diffusion v1's.

    The last two are the hint's channels and the widths of its encoder, each of which after the first halves the grid.
    """

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self):
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), list):  # as JSON has it
                object.__setattr__(self, item.name, tuple(value))

    @classmethod
    def of(cls, config: Mapping[str, Any], source: object) -> "ControlNetConfig":
        """The part of a diffusers config, a U-Net's or a `ControlNetModel`'s, that a ControlNet is built from.

        A `UserError` if the model has parts that this ControlNet does not know, such as Stable Diffusion XL's.
        """
        for name, absent in ABSENT.items():
            if config.get(name, absent) != absent:
                raise UserError(f"{source}: its {name} is {config[name]}, which is not supported; name another model")
        return cls(**{item.name: config[item.name] for item in fields(cls) if item.name in config})

    @property
    def hint_factor(self) -> int:
        """Pixels of a hint along one side of a latent."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def skip_channels(self) -> list[int]:
        """Channels of the U-Net's skips: of `conv_in`, and of every residual block and downsampling."""
        channels = [self.block_out_channels[0]]
        for width in self.block_out_channels:
            channels += [width] * (self.layers_per_block + 1)
        return channels[:-1]  # the last level has no downsampling


class HintEncoder(nn.Module):
    """Convolutions from a hint's pixels to the latent grid; the last one starts at zero."""

    gradient_checkpointing = False  # see `checkpoint_gradients`

    def __init__(self, hint_channels: int, widths: Sequence[int], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(hint_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, following in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, following, 3, padding=1, stride=2))
        self.conv_out = zero_init(nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(self.encode, hint) if again else self.encode(hint)

    def encode(self, hint: Tensor) -> Tensor:
        h = F.silu(self.conv_in(hint))
        for convolution in self.blocks:
            h = F.silu(convolution(h))
        return self.conv_out(h)


class ControlNet(nn.Module):
    """Predicts from a hint what to add to a frozen U-Net's skips and middle (Zhang et al. 2023, section 3.2).

    A new one adds nothing: its zero convolutions start at zero. Without a U-Net to copy from, weights are random.
    """

    def __init__(self, config: ControlNetConfig, unet: UNet2DConditionModel | None = None):
        super().__init__()
        self.config, first, last = config, config.block_out_channels[0], config.block_out_channels[-1]
        if unet is None:
            shared = {name: size for name, size in asdict(config).items() if not name.startswith("conditioning_")}
            up_block_types = tuple(name.replace("Down", "Up") for name in reversed(config.down_block_types))
            unet = UNet2DConditionModel(**shared, up_block_types=up_block_types)
        for part in COPIED:
            self.add_module(part, copy.deepcopy(getattr(unet, part)))
        self.controlnet_cond_embedding = HintEncoder(
            config.conditioning_channels, config.conditioning_embedding_out_channels, first
        )
        self.controlnet_down_blocks = nn.ModuleList(zero_init(nn.Conv2d(c, c, 1)) for c in config.skip_channels)
        self.controlnet_mid_block = zero_init(nn.Conv2d(last, last, 1))

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, hint_channels: Sequence[int] = (16, 32, 96, 256)) -> "ControlNet":
        """A ControlNet to train, fp32 on the U-Net's device, with a hint encoder of these widths; errors as `of`."""
        config = ControlNetConfig.of(unet.config, "the U-Net")
        controlnet = cls(replace(config, conditioning_embedding_out_channels=tuple(hint_channels)), unet)
        return controlnet.to(unet.device, torch.float32).requires_grad_().train()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.conv_in.weight.dtype

    def encode_hint(self, hint: Tensor) -> Tensor:
        """The features of hints (N, 3, H, W) in [0, 1] at the latent grid, which are the same in every step."""
        return self.controlnet_cond_embedding(hint.to(self.dtype))

    def forward(
        self, xt: Tensor, t: Tensor, context: Tensor, hint: Tensor | None = None, features: Tensor | None = None
    ) -> list[Tensor]:
        """The residuals for the U-Net's skips, in the order in which these arise, and last the middle's.

        Args:
            xt: noised latents (N, C, H, W), at the timesteps t (N,).
            context: embedded prompts (N, tokens, D).
            hint, features: a training step gives the hint, a sampler what `encode_hint` made of it.
        """
        features = self.encode_hint(hint) if features is None else features
        xt, context = xt.to(self.dtype), context.to(self.dtype)
        embedding = self.time_embedding(self.time_proj(t).to(self.dtype))

        def run(block: nn.Module, h: Tensor) -> Any:
            attended = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            return block(h, embedding, **attended)

        h = self.conv_in(xt) + features
        skips = [h]
        for block in self.down_blocks:
            h, outputs = run(block, h)
            skips += outputs
        middle = run(self.mid_block, h)
        residuals = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*residuals, self.controlnet_mid_block(middle)]

    def save(self, folder: Path, about: Mapping[str, Any], fp16: bool = True) -> None:
        """Write the folder that `load` and diffusers read, with JSON-able facts about the weights."""
        config, state = asdict(self.config), self.state_dict()
        text = json.dumps({"_class_name": "ControlNetModel"} | config, indent=2) + "\n"
        write_atomically(Path(folder) / CONFIG_FILE, lambda temporary: temporary.write_text(text))
        facts = {"kind": "ControlNet", "config": config} | dict(about)
        save_tensors(Path(folder) / WEIGHTS_FILE, to_half(state) if fp16 else state, facts)

    @classmethod
    def load(cls, path: Path) -> tuple["ControlNet", dict[str, Any]]:
        """A ControlNet in eval mode, fp32 on the CPU, and the facts saved with it.

        It may be a folder that `save` or diffusers wrote, or one file: of a training run, of diffusers, or in the
        original ControlNet's layout. A `UserError` if something is missing or broken, or belongs to another model.
        """
        path = Path(path)
        if path.is_dir():
            inner = path / "controlnet"  # of a folder such as checkpoint-500, which diffusers' training writes
            path = find_folder(inner if inner.is_dir() else path, CONFIG_FILE)
            config = read_config(path / CONFIG_FILE)
            state, about = load_tensors(find_file(path, WEIGHTS_FILE))
        elif "kind" in (file := open_weights(path)).about:
            state, about = load_model_file(path, "ControlNet")
            config = ControlNetConfig(**about["config"])
        else:
            weights = find_controlnet(file)
            with torch.device("meta"):
                controlnet = cls(ControlNetConfig(**controlnet_sizes(weights)))
            return weights.fill(controlnet), {}
        with torch.device("meta"):  # the initial weights would be overwritten anyway
            controlnet = cls(config)
        load_strictly(controlnet.to_empty(device="cpu"), state, str(path))
        return controlnet.eval(), about


def read_config(path: Path) -> ControlNetConfig:
    """The config of a ControlNet's folder; a `UserError` if the file is missing or broken, or another model's."""
    config = read_json(path, "name a ControlNet's folder, or one weights file")
    try:
        if (found := config["_class_name"]) != "ControlNetModel":
            raise ValueError(f"describes a {found}")
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: no ControlNet's config ({reason}); name its folder, or one weights file") from None
    return ControlNetConfig.of(config, path)


def check_fit(controlnet: ControlNet, base: Base, source: object) -> None:
    """Raise a `UserError` unless a ControlNet's sizes are those of the base's U-Net and of its latents."""
    theirs, ours = controlnet.config, ControlNetConfig.of(base.unet.config, "the base")
    for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        if (own := getattr(theirs, name)) != (wanted := getattr(ours, name)):
            raise UserError(f"{source}: is for a base with {name} {own}, not {wanted}; name one for this base")
    if (own := theirs.hint_factor) != base.factor:
        raise UserError(f"{source}: has {own} pixels a latent, the base has {base.factor}; name one for this base")

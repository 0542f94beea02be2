"""The sizes of a ControlNet, as diffusers' configs tell them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.cli import UserError

# What some diffusers models have and this one has not, with the value that means "absent".
ABSENT = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "global_pool_conditions": False,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "controlnet_conditioning_channel_order": "rgb",
}


@dataclass(frozen=True)
class ControlNetConfig:
    """Everything needed to rebuild a `ControlNet`; fields are named as in diffusers, defaults fit Stable Diffusion v1.

    Args:
        conditioning_channels: colour channels of a hint.
        conditioning_embedding_out_channels: widths of the hint encoder; every one after the first halves the grid.
        others: the U-Net's own.
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
    def of(cls, config: Mapping[str, Any], source: str) -> "ControlNetConfig":
        """The part of a diffusers config, of a U-Net or of a `ControlNetModel`, that a ControlNet is built from.

        Raises:
            UserError: the model has parts that this ControlNet does not know, such as Stable Diffusion XL's.
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
        *shrunk, last = self.block_out_channels
        channels = [self.block_out_channels[0]]
        for width in shrunk:
            channels += [width] * (self.layers_per_block + 1)
        return channels + [last] * self.layers_per_block


def read_config(path: Path) -> dict[str, Any]:
    """The config of a ControlNet's folder.

    Raises:
        UserError: the file is missing, not JSON, or another model's.
    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a ControlNet's folder, or one weights file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); restore it") from None
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != "ControlNetModel":
        raise UserError(f"{path}: describes a {found}, not a ControlNetModel; name a ControlNet's folder")
    return config

"""The ControlNet: a trainable copy of a frozen U-Net's encoder that reads a hint (Zhang et al. 2023).

    hint --hint encoder--> + conv_in(xt) --copied encoder--> skips, middle --zero convolutions--> residuals

The names of its weights and its files are those of diffusers' `ControlNetModel`: each loads what the other saved.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from common.checkpoint import half, load_model_file, load_strictly, load_tensors, save_tensors, write_atomically
from common.cli import UserError
from common.layers import zeroed
from latent_diffusion.base import Base
from latent_diffusion.files import controlnet_sizes, find_controlnet, open_weights
from p3_controlnet.config import ControlNetConfig, read_config
from p3_controlnet.unet import encode

COPIED = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


def new_unet(config: ControlNetConfig) -> UNet2DConditionModel:
    """A U-Net, newly initialised, whose first half has the config's sizes."""
    shared = {name: value for name, value in asdict(config).items() if not name.startswith("conditioning_")}
    up_block_types = tuple(name.replace("Down", "Up") for name in reversed(config.down_block_types))
    return UNet2DConditionModel(**shared, up_block_types=up_block_types)


class HintEncoder(nn.Module):
    """Convolutions from a hint's pixels to the latent grid; the last one starts at zero.

    Args:
        hint_channels: colour channels of the hint.
        widths: see `ControlNetConfig.conditioning_embedding_out_channels`.
        out_channels: width of the U-Net's first level.
    """

    gradient_checkpointing = False  # see `checkpoint_gradients`

    def __init__(self, hint_channels: int, widths: Sequence[int], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(hint_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, following in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, following, 3, padding=1, stride=2))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], out_channels, 3, padding=1))

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

    A new one adds nothing: its zero convolutions start at zero.

    Args:
        config: sizes; see `ControlNetConfig`.
        unet: whose first half is copied; by default a new one. See `from_unet`.
    """

    def __init__(self, config: ControlNetConfig, unet: UNet2DConditionModel | None = None):
        super().__init__()
        self.config, first = config, config.block_out_channels[0]
        unet = new_unet(config) if unet is None else unet
        for part in COPIED:
            self.add_module(part, copy.deepcopy(getattr(unet, part)))
        self.controlnet_cond_embedding = HintEncoder(
            config.conditioning_channels, config.conditioning_embedding_out_channels, first
        )
        self.controlnet_down_blocks = nn.ModuleList(zeroed(nn.Conv2d(c, c, 1)) for c in config.skip_channels)
        last = config.block_out_channels[-1]
        self.controlnet_mid_block = zeroed(nn.Conv2d(last, last, 1))

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, hint_channels: Sequence[int] = (16, 32, 96, 256)) -> "ControlNet":
        """A trainable copy of a U-Net's encoder, fp32, on its device, with a new hint encoder and zero convolutions.

        Args:
            unet: stays as it is.
            hint_channels: see `ControlNetConfig.conditioning_embedding_out_channels`.

        Raises:
            UserError: the U-Net has parts that a ControlNet does not know.
        """
        config = ControlNetConfig.of(unet.config, "the U-Net")
        controlnet = cls(replace(config, conditioning_embedding_out_channels=tuple(hint_channels)), unet)
        return controlnet.to(unet.device, torch.float32).requires_grad_().train()

    @property
    def residual_count(self) -> int:
        """How many residuals there are: one a skip, and the middle's."""
        return len(self.controlnet_down_blocks) + 1

    def encode_hint(self, hint: Tensor) -> Tensor:
        """The hint's features at the latent grid, which do not change from step to step.

        Args:
            hint: (N, 3, H, W) in [0, 1], H and W divisible by `config.hint_factor`.
        """
        return self.controlnet_cond_embedding(hint.to(self.conv_in.weight.dtype))

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        context: Tensor,
        hint: Tensor | None = None,
        features: Tensor | None = None,
        scale: float | Sequence[float] = 1.0,
    ) -> list[Tensor]:
        """The residuals for the U-Net's skips, in the order in which they arise, and last the middle's.

        Args:
            xt: noised latents (N, C, H, W).
            t: timesteps (N,).
            context: embedded prompts (N, tokens, D).
            hint: as `encode_hint` takes it; a training step gives this one.
            features: what `encode_hint` made of the hint; a sampler gives this one.
            scale: strength of the control: one number, or one a residual.
        """
        features = self.encode_hint(hint) if features is None else features
        encoded = encode(self, xt, t, context, features)
        residuals = [zero(h) for zero, h in zip(self.controlnet_down_blocks, encoded.skips, strict=True)]
        residuals.append(self.controlnet_mid_block(encoded.middle))
        scales = [scale] * len(residuals) if isinstance(scale, int | float) else scale
        return [residual * s for residual, s in zip(residuals, scales, strict=True)]

    def save(self, folder: Path, about: Mapping[str, Any], fp16: bool = True) -> None:
        """Write the folder that `load`, and diffusers' `ControlNetModel.from_pretrained`, reads.

        Args:
            folder: made if need be; an earlier ControlNet in it is replaced.
            about: JSON-able facts to keep with the weights.
            fp16: store half precision.

        Raises:
            UserError: the folder cannot be written.
        """
        config = {"_class_name": "ControlNetModel"} | asdict(self.config)
        state = self.state_dict()
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(Path(folder) / CONFIG_FILE, lambda temporary: temporary.write_text(text))
        facts = {"kind": "ControlNet", "config": asdict(self.config)} | dict(about)
        save_tensors(Path(folder) / WEIGHTS_FILE, half(state) if fp16 else state, facts)

    @classmethod
    def load(cls, path: Path) -> tuple["ControlNet", dict[str, Any]]:
        """A ControlNet in eval mode, fp32 on the CPU, and the facts saved with it.

        Args:
            path: a folder that `save` or diffusers wrote, or one file: of a training run, of diffusers, or in the
                original ControlNet's layout.

        Raises:
            UserError: something is missing or broken, or belongs to another model.
        """
        path = Path(path)
        if path.is_dir():
            config = ControlNetConfig.of(read_config(path / CONFIG_FILE), str(path / CONFIG_FILE))
            state, about = load_tensors(path / WEIGHTS_FILE)
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


def check_fit(controlnet: ControlNet, base: Base, source: str) -> None:
    """Make sure that a ControlNet steers this base.

    Raises:
        UserError: it was made for a U-Net of other sizes, or for latents of another factor.
    """
    for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        theirs, ours = getattr(controlnet.config, name), base.unet.config[name]
        if theirs != (tuple(ours) if isinstance(ours, list) else ours):
            raise UserError(f"{source}: is for a base with {name} {theirs}, not {ours}; name one for this base")
    if controlnet.config.hint_factor != base.factor:
        raise UserError(
            f"{source}: its hints have {controlnet.config.hint_factor} pixels a latent, the base has {base.factor};"
            " name one for this base"
        )

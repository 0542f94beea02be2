"""The Context-UNet: a small U-Net in which the timestep and the class scale and shift the features.

One embedding table holds a row for each of the twenty joint classes (domain, digit) and one for the null class of
classifier-free guidance. The class's row is added to the time embedding, and every residual block turns the sum into a
scale and a shift of its normalised features (Dhariwal and Nichol 2021, appendix A, "adaptive group norm").

Small images with few channels keep a processor waiting, so the stem folds blocks of pixels into channels: 28x28x3
becomes 14x14x12, the same work in a quarter of the positions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Attention, group_norm, zero_init


@dataclass(frozen=True)
class ContextUNetConfig:
    """Everything needed to rebuild a `ContextUNet`; in every checkpoint. A `ValueError` if sizes do not fit."""

    num_labels: int = 20  # classes that can be drawn; label `num_labels` is the null label ("no condition")
    image_channels: int = 3
    patch_size: int = 2  # side of the blocks of pixels that the stem folds into channels; 1 folds none
    widths: tuple[int, ...] = (96, 192)  # channels of each level, finest first; each level halves the grid before it
    blocks: tuple[int, ...] = (1, 2)  # residual blocks of each level in the encoder; the decoder has as many
    middle_blocks: int = 1  # residual blocks between encoder and decoder
    attention: tuple[bool, ...] = (False, False)  # whether each level's blocks attend over all positions
    middle_attention: bool = True  # whether the middle's blocks do
    heads: int = 2  # attention heads; they divide the width of every level that attends
    embedding: int = 384  # width of the time and context embeddings
    dropout: float = 0.0  # probability of dropout inside residual blocks

    def __post_init__(self):
        for name in ("widths", "blocks", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.widths) == len(self.blocks) == len(self.attention):
            raise ValueError(
                f"widths {self.widths}, blocks {self.blocks} and attention {self.attention} need one entry a level"
            )
        if min(self.widths) < 1 or min(self.blocks) < 1:
            raise ValueError(f"widths {self.widths} and blocks {self.blocks} must be above 0")
        if self.widths[0] % 2:
            raise ValueError(f"width {self.widths[0]} of the finest level must be even, for sines and cosines of time")
        attended = [width for width, attends in zip(self.widths, self.attention) if attends]
        attended += [self.widths[-1]] * self.middle_attention
        if odd := [width for width in attended if width % self.heads]:
            raise ValueError(f"width {odd[0]} must be divisible by {self.heads} attention heads")

    @property
    def stride(self) -> int:
        """Image sides must be divisible by this."""
        return self.patch_size * 2 ** (len(self.widths) - 1)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of timesteps (N,): float32 (N, width), sines, then cosines; `width` is even.

    Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection; the embedding scales and shifts the features between them."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = zero_init(nn.Linear(embedding, 2 * out_channels))
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class Stage(nn.Module):
    """A residual block, followed by attention where the config asks for it."""

    def __init__(self, in_channels: int, out_channels: int, config: ContextUNetConfig, attention: bool):
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, config.embedding, config.dropout)
        self.attention = Attention(out_channels, config.heads) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(x, embedding))


class ContextUNet(nn.Module):
    """Predicts eps, x0 or v, whichever it was trained for, from a noised image, its timestep and its label."""

    def __init__(self, config: ContextUNetConfig = ContextUNetConfig()):
        super().__init__()
        self.config = config
        widths, folded = config.widths, config.image_channels * config.patch_size**2
        self.time = nn.Sequential(
            nn.Linear(widths[0], config.embedding), nn.SiLU(), nn.Linear(config.embedding, config.embedding)
        )
        self.context = nn.Embedding(config.num_labels + 1, config.embedding)
        self.stem = nn.Conv2d(folded, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        skips, channels = [], widths[0]
        for level, width in enumerate(widths):
            self.shrink.append(nn.Conv2d(channels, width, 3, stride=2, padding=1) if level else nn.Identity())
            channels = width
            stages = [Stage(channels, width, config, config.attention[level]) for _ in range(config.blocks[level])]
            self.down.append(nn.ModuleList(stages))
            skips += [width] * config.blocks[level]

        self.middle = nn.ModuleList(
            Stage(channels, channels, config, config.middle_attention) for _ in range(config.middle_blocks)
        )

        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for level in reversed(range(len(widths))):
            stages = nn.ModuleList()
            for _ in range(config.blocks[level]):
                stages.append(Stage(channels + skips.pop(), widths[level], config, config.attention[level]))
                channels = widths[level]
            self.up.append(stages)
            finer = widths[level - 1] if level else channels
            self.grow.append(nn.Conv2d(channels, finer, 3, padding=1) if level else nn.Identity())
            channels = finer

        self.head = nn.Sequential(group_norm(channels), nn.SiLU(), zero_init(nn.Conv2d(channels, folded, 3, padding=1)))

    @property
    def null_label(self) -> int:
        """The label that means "no condition"."""
        return self.config.num_labels

    def forward(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The prediction, shaped as `xt`.

        Args:
            xt: noised images (N, C, H, W), H and W divisible by `config.stride`.
            t: timesteps (N,), indices into `alphas_cumprod`.
            labels: class ids (N,), 0..num_labels-1, or `null_label` for no condition.
        """
        embedding = F.silu(self.time(timestep_embedding(t, self.config.widths[0])) + self.context(labels))

        h = self.stem(F.pixel_unshuffle(xt, self.config.patch_size))
        skips = []
        for shrink, stages in zip(self.shrink, self.down):
            h = shrink(h)
            for stage in stages:
                h = stage(h, embedding)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding)
        for stages, grow in zip(self.up, self.grow):
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
            if not isinstance(grow, nn.Identity):
                h = grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.head(h), self.config.patch_size)

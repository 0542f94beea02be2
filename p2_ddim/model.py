"""The face U-Net: the course's network by default, and smaller ones of the same kind by config.

The network is a table of layers (`layout`), and the names of its weights follow from it: `down1..`, `mid1..` and
`up1..` are numbered in the order in which they run. The output of every `down` layer is kept, and popped last-first by
the residual blocks of `up`.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import load_about, load_model_file, load_pt, load_strictly, load_tensors
from common.cli import UserError
from common.layers import group_norm, zeroed
from common.schedule import NoiseSchedule


@dataclass(frozen=True)
class FaceUNetConfig:
    """Everything needed to rebuild a `FaceUNet`; stored in every checkpoint. The defaults are the course's network.

    Args:
        image_channels: colour channels of the images.
        patch_size: side of the pixel blocks folded into channels by the stem (1 = none). Folding by 2 does the same
            work on a quarter of the positions, which small networks afford well.
        widths: channels of each level, finest first; every level after the first halves the grid.
        blocks: residual blocks of each level in the encoder (the decoder has one more a level).
        attention: whether each level's blocks attend over all positions.
        middle_attention: the residual blocks between encoder and decoder, and which of them attend.
        embedding: width of the time embedding.
        dropout: dropout probability inside residual blocks.
        means: whether the output also gets a linear map, by the timestep, of the folded channels' means over the image.
            Group norms all but hide these from the network, and where pixels are folded they are not its brightness
            alone but also the finest checkerboards, which would stay in the picture as the noise had them.
    """

    image_channels: int = 3
    patch_size: int = 1
    widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    blocks: int = 2
    attention: tuple[bool, ...] = (False, False, False, False, True, False)
    middle_attention: tuple[bool, ...] = (True, False)
    embedding: int = 512
    dropout: float = 0.0
    means: bool = False

    def __post_init__(self):
        for name in ("widths", "attention", "middle_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.widths or len(self.widths) != len(self.attention):
            raise ValueError(f"widths {self.widths} and attention {self.attention} need one entry a level")
        if min(self.widths) < 2 or self.widths[0] % 2 or self.blocks < 1 or self.patch_size < 1:
            raise ValueError(
                f"widths {self.widths}, blocks {self.blocks}, patch size {self.patch_size}: the first width must be"
                " even, widths start at 2 and the others at 1"
            )

    @property
    def stride(self) -> int:
        """Image sides must be divisible by this."""
        return self.patch_size * 2 ** (len(self.widths) - 1)

    @property
    def folded_channels(self) -> int:
        """Channels of an image once its pixel blocks are folded."""
        return self.image_channels * self.patch_size**2


# What a bare state dict does not say, the course does: its schedule, and that its network predicts eps.
COURSE = {
    "kind": "FaceUNet",
    "config": asdict(FaceUNetConfig()),
    "schedule": asdict(NoiseSchedule("linear", 1000, 1e-4, 2e-2)),
    "prediction": "eps",
    "image_size": 256,
}


class Layer(NamedTuple):
    """One row of the network's table; kinds are "conv", "block", "shrink" and "grow"."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    attention: bool = False


def layout(config: FaceUNetConfig) -> tuple[list[Layer], list[Layer], list[Layer]]:
    """The layers of the encoder, the middle and the decoder, in the order in which they run."""
    widths, levels = config.widths, range(len(config.widths))
    down, middle, up = [], [], []

    def add(part: list[Layer], prefix: str, *rest) -> None:
        part.append(Layer(f"{prefix}{len(part) + 1}", *rest))

    add(down, "down", "conv", config.folded_channels, widths[0])
    for level in levels:
        if level:
            add(down, "down", "shrink", widths[level - 1], widths[level - 1])
        for _ in range(config.blocks):
            add(down, "down", "block", down[-1].out_channels, widths[level], config.attention[level])
    for attention in config.middle_attention:
        add(middle, "mid", "block", widths[-1], widths[-1], attention)
    skips, channels = [layer.out_channels for layer in down], widths[-1]
    for level in reversed(levels):
        # One block more than in the encoder: the level's stem or downsampling left a skip, too.
        for _ in range(config.blocks + 1):
            add(up, "up", "block", channels + skips.pop(), widths[level], config.attention[level])
            channels = widths[level]
        if level:
            add(up, "up", "grow", channels, channels)
    return down, middle, up


class TimeSinusoids(nn.Module):
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5): (N,) -> (N, width), sines, then cosines."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("inv_freq", torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the time embedding is added between them."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()  # saves time and memory, but backward needs both tensors
        h = self.conv1(F.silu(self.norm1(x), in_place))
        h = h + self.time(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h), in_place)))


class Attention(nn.Module):
    """Self-attention with one head over all grid positions, as a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # (n, 3c, h, w) -> q, k and v, each (n, 1 head, positions, c); softmax(q k / sqrt(c)) is the default scale.
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class Block(nn.Module):
    """A residual block (`resblocks`, the name in the course's weights) and, where the table says so, attention."""

    def __init__(self, layer: Layer, config: FaceUNetConfig):
        super().__init__()
        self.resblocks = ResidualBlock(layer.in_channels, layer.out_channels, config.embedding, config.dropout)
        self.attention = Attention(layer.out_channels) if layer.attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.resblocks(x, embedding))


def make_layer(layer: Layer, config: FaceUNetConfig) -> nn.Module:
    """The module of one row of the table."""
    channels = layer.in_channels, layer.out_channels
    if layer.kind == "block":
        return Block(layer, config)
    if layer.kind == "shrink":
        return nn.Sequential(nn.Conv2d(*channels, 3, stride=2, padding=1))
    if layer.kind == "grow":
        return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(*channels, 3, padding=1))
    return nn.Conv2d(*channels, 3, padding=1)


class FaceUNet(nn.Module):
    """Predicts eps or v (whatever it was trained for) from a noised image and its timestep.

    Args:
        config: sizes; see `FaceUNetConfig`.
    """

    def __init__(self, config: FaceUNetConfig = FaceUNetConfig()):
        super().__init__()
        self.config, width = config, config.widths[0]
        self.down, self.middle, self.up = layout(config)
        self.time = nn.Sequential(
            TimeSinusoids(width), nn.Linear(width, config.embedding), nn.SiLU(),
            nn.Linear(config.embedding, config.embedding),
        )  # fmt: skip
        for layer in (*self.down, *self.middle, *self.up):
            self.add_module(layer.name, make_layer(layer, config))
        last = zeroed(nn.Conv2d(width, config.folded_channels, 3, padding=1))
        self.out = nn.Sequential(group_norm(width), nn.SiLU(), last)
        if config.means:
            self.means = zeroed(nn.Linear(config.embedding, config.folded_channels**2))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """One prediction.

        Args:
            xt: noised images (N, C, H, W), H and W divisible by `config.stride`.
            t: timesteps (N,), indices into `alphas_cumprod`.

        Returns:
            The prediction, shaped as `xt`.
        """
        embedding = self.time(t)

        def run(layer: Layer, x: Tensor) -> Tensor:
            module = getattr(self, layer.name)
            return module(x, embedding) if layer.kind == "block" else module(x)

        h = folded = F.pixel_unshuffle(xt, self.config.patch_size)
        skips = []
        for layer in self.down:
            h = run(layer, h)
            skips.append(h)
        for layer in self.middle:
            h = run(layer, h)
        for layer in self.up:
            h = run(layer, torch.cat([h, skips.pop()], dim=1) if layer.kind == "block" else h)
        output = self.out(h)
        if self.config.means:
            weights = self.means(embedding).unflatten(1, (folded.shape[1], folded.shape[1]))
            output = output + torch.einsum("nij,njhw->nihw", weights, folded.mean(dim=(2, 3), keepdim=True))
        return F.pixel_shuffle(output, self.config.patch_size)


def load_face_unet(path: Path) -> tuple[FaceUNet, dict[str, Any]]:
    """The network of a weights file in eval mode, fp32 on the CPU, and the facts about it.

    Args:
        path: a checkpoint of ours, whose facts say how to build the network, or a bare state dict of the course's
            network (`.pt`, or safetensors without facts), which gets the facts in `COURSE`.

    Raises:
        UserError: the file is missing, truncated, carries code, lacks facts, or does not fit the network.
    """
    path, about = Path(path), COURSE
    if path.suffix == ".safetensors":
        state, about = load_model_file(path, "FaceUNet") if load_about(path) else (load_tensors(path)[0], COURSE)
    else:
        state = load_pt(path)
        if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
        ):
            raise UserError(f"{path}: no state dict of tensors; save one with torch.save(model.state_dict(), ...)")
    if missing := [fact for fact in COURSE if fact not in about]:
        raise UserError(f"{path}: does not say its {missing[0]}; save it with train.py")
    try:
        config = FaceUNetConfig(**about["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its config is of another version ({error}); train with this one") from None
    with torch.device("meta"):  # the initial weights would be overwritten anyway
        model = FaceUNet(config)
    load_strictly(model.to_empty(device="cpu"), state, str(path))
    return model.eval(), about

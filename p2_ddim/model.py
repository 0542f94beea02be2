"""The face U-Net: the course's network by default, and smaller ones of the same kind by config.

Layers are called `down1..`, `mid1..` and `up1..` in the order in which they run, and so are their weights. The output
of every `down` layer is kept, and the blocks of `up` take the outputs back, the last one first.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import load_about, load_model_file, load_strictly, load_tensors
from common.cli import UserError
from common.layers import Attention, group_norm, zero_init
from common.schedule import NoiseSchedule


@dataclass(frozen=True)
class FaceUNetConfig:
    """Everything needed to rebuild a `FaceUNet`; stored in every checkpoint. The defaults are the course's network.

    A `ValueError` if the sizes do not fit one another.
    """

    image_channels: int = 3
    patch_size: int = 1  # side of the blocks of pixels that are folded into channels; 1 folds none
    widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)  # channels of each level, finest first; each level halves
    blocks: int = 2  # residual blocks of each level in the encoder; the decoder has one more a level
    attention: tuple[bool, ...] = (False, False, False, False, True, False)  # whether each level's blocks attend
    middle_attention: tuple[bool, ...] = (True, False)  # one for each block between encoder and decoder
    embedding: int = 512  # width of the time embedding
    dropout: float = 0.0  # probability of dropout inside residual blocks
    # Add a linear map, chosen by the timestep, of the folded channels' means over the image. Group norms nearly remove
    # these means: with folding, not only the brightness but also the finest checkerboards.
    means: bool = False

    def __post_init__(self):
        for name in ("widths", "attention", "middle_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.widths or len(self.widths) != len(self.attention):
            raise ValueError(f"widths {self.widths} and attention {self.attention} need one entry a level")
        if min(self.widths) < 2 or self.widths[0] % 2 or min(self.blocks, self.patch_size) < 1:
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
        """Channels of an image whose pixel blocks are folded."""
        return self.image_channels * self.patch_size**2


# The facts about the course's UNet.pt, which is a bare state dict.
COURSE = {
    "kind": "FaceUNet",
    "config": asdict(FaceUNetConfig()),
    "schedule": asdict(NoiseSchedule("linear", 1000, 1e-4, 2e-2)),
    "prediction": "eps",
    "image_size": 256,
}


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
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()  # saves time and memory, but backward needs both tensors
        h = self.conv1(F.silu(self.norm1(x), in_place))
        h = h + self.time(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h), in_place)))


class Block(nn.Module):
    """A residual block, called `resblocks` in the course's weights, and attention where the config says so."""

    def __init__(self, in_channels: int, out_channels: int, attention: bool, config: FaceUNetConfig):
        super().__init__()
        self.resblocks = ResidualBlock(in_channels, out_channels, config.embedding, config.dropout)
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.resblocks(x, embedding))


class FaceUNet(nn.Module):
    """Predicts eps, x0 or v, whichever it was trained for, from a noised image and its timestep."""

    def __init__(self, config: FaceUNetConfig = FaceUNetConfig()):
        super().__init__()
        self.config, width, embedding = config, config.widths[0], config.embedding
        self.time = nn.Sequential(
            TimeSinusoids(width), nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.add_layers()
        last = zero_init(nn.Conv2d(width, config.folded_channels, 3, padding=1))
        self.out = nn.Sequential(group_norm(width), nn.SiLU(), last)
        if config.means:
            self.means = zero_init(nn.Linear(embedding, config.folded_channels**2))

    def add_layers(self) -> None:
        """Make the layers of the encoder (down), the middle (mid) and the decoder (up)."""
        config, channels = self.config, self.config.widths[0]

        def add(part: str, layer: nn.Module) -> None:
            self.add_module(f"{part}{len(self.layers(part)) + 1}", layer)

        add("down", nn.Conv2d(config.folded_channels, channels, 3, padding=1))
        skips = [channels]
        for level, width in enumerate(config.widths):
            if level:
                add("down", nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                skips.append(channels)
            for _ in range(config.blocks):
                add("down", Block(channels, width, config.attention[level], config))
                channels = width
                skips.append(channels)
        for attention in config.middle_attention:
            add("mid", Block(channels, channels, attention, config))
        for level, width in reversed(list(enumerate(config.widths))):
            # One block more than in the encoder: the first or the downsampling convolution left a skip, too.
            for _ in range(config.blocks + 1):
                add("up", Block(channels + skips.pop(), width, config.attention[level], config))
                channels = width
            if level:
                grow = nn.Upsample(scale_factor=2.0, mode="nearest")
                add("up", nn.Sequential(grow, nn.Conv2d(channels, channels, 3, padding=1)))

    def layers(self, part: str) -> list[nn.Module]:
        """The layers of "down", "mid" or "up", in the order in which they run."""
        return [layer for name, layer in self.named_children() if name.startswith(part)]

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """The prediction, shaped as xt.

        Args:
            xt: noised images (N, C, H, W), H and W divisible by `config.stride`.
            t: timesteps (N,), indices into `alphas_cumprod`.
        """
        embedding = self.time(t)
        h = folded = F.pixel_unshuffle(xt, self.config.patch_size)
        skips = []
        for layer in self.layers("down"):
            h = layer(h, embedding) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for block in self.layers("mid"):
            h = block(h, embedding)
        for layer in self.layers("up"):
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding) if isinstance(layer, Block) else layer(h)
        output = self.out(h)
        if self.config.means:
            weights = self.means(embedding).unflatten(1, (folded.shape[1], folded.shape[1]))
            output = output + torch.einsum("nij,njhw->nihw", weights, folded.mean(dim=(2, 3), keepdim=True))
        return F.pixel_shuffle(output, self.config.patch_size)


def load_face_unet(path: Path) -> tuple[FaceUNet, dict[str, Any]]:
    """The network of a weights file, fp32 on the CPU and in eval mode, and the facts about it.

    A checkpoint of train.py holds its facts; to a state dict of the course's network belong those in `COURSE`. A
    `UserError` as `open_weights`, or if facts are missing or the weights do not fit the network.
    """
    ours = "kind" in load_about(path)
    state, about = load_model_file(path, "FaceUNet") if ours else (load_tensors(path)[0], COURSE)
    if missing := [fact for fact in COURSE if fact not in about]:
        raise UserError(f"{path}: does not say its {missing[0]}; save it with train.py")
    try:
        config = FaceUNetConfig(**about["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its config is of another version ({error}); train with this one") from None
    with torch.device("meta"):  # no initial weights, since they would be overwritten
        model = FaceUNet(config)
    load_strictly(model.to_empty(device="cpu"), state, str(path))
    return model.eval(), about

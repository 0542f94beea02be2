"""What the public solutions run, written plainly: the network and the loop that most of them start from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.schedule import NoiseSchedule


def conv_pair(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm and GELU."""
    layers = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.GELU()]
    return nn.Sequential(*layers)


def embed(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))


class PlainContextUNet(nn.Module):
    """The layers of Pearce's conditional-MNIST network (MIT licence) for 28x28 colour images.

    All its convolutions run at 28x28 and 14x14 with up to 512 channels; context multiplies, time adds.

    Args:
        width: channels at full size; the public solutions use 256, which is 26 million parameters.
        num_labels: classes; a label of -1 is no condition.
    """

    def __init__(self, width: int = 256, num_labels: int = 20):
        super().__init__()
        self.num_labels = num_labels
        self.first, self.first_again = conv_pair(3, width)[:3], conv_pair(width, width)[:3]
        self.down1 = nn.Sequential(conv_pair(width, width), nn.MaxPool2d(2))
        self.down2 = nn.Sequential(conv_pair(width, 2 * width), nn.MaxPool2d(2))
        self.vector = nn.Sequential(nn.AvgPool2d(7), nn.GELU())
        self.time1, self.time2 = embed(1, 2 * width), embed(1, width)
        self.context1, self.context2 = embed(num_labels, 2 * width), embed(num_labels, width)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * width, 2 * width, 7, 7), nn.GroupNorm(8, 2 * width), nn.ReLU())
        self.up1 = self.up_block(4 * width, width)
        self.up2 = self.up_block(2 * width, width)
        self.out = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip

    @staticmethod
    def up_block(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ConvTranspose2d(in_channels, out_channels, 2, 2),
            conv_pair(out_channels, out_channels),
            conv_pair(out_channels, out_channels),
        )

    def forward(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """eps for images (N, 3, 28, 28), times (N,) in [0, 1] and labels (N,)."""
        context = F.one_hot(labels.clamp(min=0), self.num_labels).to(xt) * (labels >= 0)[:, None]
        time = t.to(xt)[:, None]
        first = self.first(xt)
        first = (first + self.first_again(first)) / 2**0.5
        half = self.down1(first)
        quarter = self.down2(half)
        h = self.up0(self.vector(quarter))
        h = self.context1(context)[:, :, None, None] * h + self.time1(time)[:, :, None, None]
        h = self.up1(torch.cat([h, quarter], 1))
        h = self.context2(context)[:, :, None, None] * h + self.time2(time)[:, :, None, None]
        h = self.up2(torch.cat([h, half], 1))
        return self.out(torch.cat([h, first], 1))


@torch.no_grad()
def plain_steps(model: PlainContextUNet, xt: Tensor, labels: Tensor, guidance: float, steps: int) -> Tensor:
    """The first `steps` of 1000 ancestral steps with guidance (Ho et al. 2020, algorithm 2), in fp32."""
    schedule = NoiseSchedule("linear")
    both = torch.cat([labels, torch.full_like(labels, -1)])
    for t in range(999, 999 - steps, -1):
        time = torch.full((len(both),), t / 1000)
        cond, uncond = model(torch.cat([xt, xt]), time, both).chunk(2)
        eps = (1 + guidance) * cond - guidance * uncond
        alpha, alpha_bar = 1 - float(schedule.betas[t]), float(schedule.alphas_cumprod[t])
        mean = (xt - (1 - alpha) / (1 - alpha_bar) ** 0.5 * eps) / alpha**0.5
        xt = mean + float(schedule.betas[t]) ** 0.5 * torch.randn_like(xt)
    return xt

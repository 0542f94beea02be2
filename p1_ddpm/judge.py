"""The judges: who says which digit an image shows, for each domain, and the course's own LeNet.

A judge is a small residual network trained on real images only. It scores what the diffusion model draws, and is never
used to train it or to pick its images. `python evaluate.py --train-judge` makes the shipped ones.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import half, load_model_file, load_pt, load_strictly, save_tensors
from common.cli import UserError, progress
from common.data import LabelledImages, jitter, shuffled_indices, to_unit_range
from common.training_options import TrainingOptions

IMAGE_SIZE = 28
WEIGHTS = Path(__file__).resolve().parent / "weights"
# How often a judge sees each image of its domain; SVHN's are few.
EPOCHS = {"mnistm": 3, "svhn": 40}


@dataclass(frozen=True)
class JudgeConfig:
    """Everything needed to rebuild a `Judge`.

    Args:
        num_labels: digits to tell apart.
        widths: channels at full, half and quarter resolution; the last is also the number of features.
        dropout: probability that a feature is dropped before the last layer.
    """

    num_labels: int = 10
    widths: tuple[int, int, int] = (32, 64, 128)
    dropout: float = 0.2

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, around a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(h)))


class Judge(nn.Module):
    """Classifies one domain's digits.

    Args:
        config: sizes; see `JudgeConfig`.
    """

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config = config
        fine, middle, coarse = config.widths
        self.body = nn.Sequential(
            nn.Conv2d(3, fine, 3, padding=1, bias=False),
            nn.BatchNorm2d(fine),
            nn.ReLU(),
            ResidualBlock(fine, middle, 2),
            ResidualBlock(middle, middle, 1),
            ResidualBlock(middle, coarse, 2),
            ResidualBlock(coarse, coarse, 1),
        )
        self.dropout = nn.Dropout(config.dropout)
        self.last = nn.Linear(coarse, config.num_labels)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: images (N, 3, 28, 28) in [-1, 1] -> (N, widths[-1])."""
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 28, 28) in [-1, 1] -> logits (N, num_labels)."""
        return self.last(self.dropout(self.features(images)))


class LeNet(nn.Module):
    """The network of the course's `Classifier.pth`: images (N, 3, 28, 28) in [-1, 1] -> logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(256, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(images)), 2)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(h)))))


class LoadedJudge(NamedTuple):
    """A judge and what is known about it (`held_out_accuracy`, `training`, ...)."""

    model: Judge
    about: dict[str, Any]


def judge_path(folder: Path, domain: str) -> Path:
    """Where a domain's judge lies."""
    return Path(folder) / f"judge_{domain}.safetensors"


def load_judge(folder: Path, domain: str) -> LoadedJudge:
    """The judge of a domain.

    Raises:
        UserError: it is missing, truncated, or something else.
    """
    path = judge_path(folder, domain)
    if not path.exists():
        raise UserError(f"{path}: no such judge; restore it with git, or train it with evaluate.py --train-judge")
    state, about = load_model_file(path, "Judge")
    model = Judge(JudgeConfig(**about["config"]))
    load_strictly(model, state, str(path))
    return LoadedJudge(model.eval(), about)


def load_classifier(path: Path) -> LeNet:
    """The course's `Classifier.pth`: a dictionary whose `state_dict` fits `LeNet`.

    Raises:
        UserError: no such file, not that kind of file, or the weights do not fit.
    """
    saved = load_pt(path)
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state_dict"), Mapping):
        raise UserError(f"{path}: has no state_dict; name the course's Classifier.pth")
    model = LeNet()
    load_strictly(model, saved["state_dict"], str(path))
    return model.eval()


@torch.inference_mode()
def in_batches(function, images: Tensor, batch_size: int = 500) -> Tensor:
    """`function` of uint8 images (N, 3, H, W), which it gets in [-1, 1], a batch at a time."""
    return torch.cat([function(to_unit_range(part)) for part in progress(images.split(batch_size), "judging", "part")])


def correct(model: nn.Module, images: LabelledImages) -> Tensor:
    """Which images show the digit that they should, bool (N,)."""
    return in_batches(model, images.images).argmax(dim=1) == images.labels


def distort(images: Tensor, generator: torch.Generator, turn: float = 10, zoom: float = 0.12) -> Tensor:
    """Images turned, stretched and slanted a little, each in its own way; edges are repeated, nothing is mirrored.

    Args:
        images: float (N, C, H, W).
        turn: largest rotation and slant, degrees.
        zoom: largest relative change of width and height.
    """
    n = len(images)
    angle, slant = (torch.rand(2, n, generator=generator) * 2 - 1) * math.radians(turn)
    width, height = 1 + (torch.rand(2, n, generator=generator) * 2 - 1) * zoom
    rows = [
        torch.stack([width * angle.cos(), height * (slant - angle.sin())], dim=1),
        torch.stack([width * angle.sin(), height * angle.cos()], dim=1),
    ]
    matrix = F.pad(torch.stack(rows, dim=1), (0, 1))
    where = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, padding_mode="border", align_corners=False)


def tint(images: Tensor, generator: torch.Generator, strength: float = 0.2) -> Tensor:
    """Images whose colour channels are scaled apart, and half of them turned to their negative."""
    n, channels = images.shape[:2]
    gain = 1 + strength * (torch.rand(n, channels, 1, 1, generator=generator) * 2 - 1)
    sign = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 2 - 1
    return (images * gain * sign).clamp(-1, 1)


class JudgeBatches:
    """Draws distorted training images.

    Args:
        images: what to draw from.
        batch_size: images a batch.
        seed: of the order in which they come.
    """

    def __init__(self, images: LabelledImages, batch_size: int, seed: int):
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = shuffled_indices(len(self.images), self.seed, step * self.batch_size, self.batch_size)
        images = distort(to_unit_range(self.images.images[index]), generator)
        images = tint(jitter(images, generator, shift=2, contrast=0.3), generator)
        return {"images": images, "labels": self.images.labels[index]}


def judge_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy. Smoothed labels would score no better and crowd a class's features together, which
    precision and recall are measured on."""
    images = batch["images"].contiguous(memory_format=torch.channels_last)
    return F.cross_entropy(model(images).float(), batch["labels"])


def judge_options(steps: int, **changed) -> TrainingOptions:
    """How a judge is trained; `changed` fields differ."""
    usual = {
        "lr": 4e-3,
        "weight_decay": 0.05,
        "warmup": steps // 8,
        "decay": "cosine",
        "decay_fraction": 0.85,
        "clip": 5.0,
        "ema": 0.99,
    }
    return TrainingOptions(**usual | changed, steps=steps, save_every=steps)


def train_judge(
    domain: str,
    images: LabelledImages,
    epochs: float,
    folder: Path = WEIGHTS,
    config: JudgeConfig = JudgeConfig(),
    batch_size: int = 128,
    **changed,
) -> Path:
    """Train a domain's judge on the training part of `images.split()`, and measure it once on the held-out part.

    Args:
        domain: whose judge.
        images: real images of that domain, 28x28.
        epochs: how often each image is seen.
        folder: where the finished weights go.
        config: sizes of the network.
        batch_size: images an optimizer step.
        changed: fields of `TrainingOptions` that differ from `judge_options`.

    Returns:
        The written file; its facts hold `held_out_accuracy` (0 to 1) and `held_out` (how many images).
    """
    from common.training import Trainer  # here, because judging needs none of what it imports

    train, held = images.split()
    options = judge_options(max(1, round(epochs * len(train) / batch_size)), batch_size=batch_size, **changed)
    torch.manual_seed(options.seed)
    about = {"kind": "Judge", "config": asdict(config), "domain": domain, "image_size": IMAGE_SIZE}
    # A judge takes minutes and starts anew when asked for again, so its training state is kept nowhere.
    with tempfile.TemporaryDirectory() as states:
        batches = JudgeBatches(train, batch_size, options.seed)
        model = Trainer(Judge(config), options, Path(states), about, batches, judge_loss).run()
    # Measured as it will be loaded: from fp16 weights.
    state = half(model.state_dict())
    load_strictly(judge := Judge(config), state, domain)
    accuracy = correct(judge.eval(), held).double().mean().item()
    path = judge_path(folder, domain)
    facts = {"held_out_accuracy": accuracy, "held_out": len(held), "trained_on": len(train), "epochs": epochs}
    save_tensors(path, state, about | facts | {"training": asdict(options)})
    return path

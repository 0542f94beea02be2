"""The judges, which tell what digit an image shows, one for each domain; and the course's own LeNet.

A judge is a small residual network trained on real images only. It scores what the diffusion model draws, and is never
used to train it or to pick its images.

python judge.py --out runs/judges   # train a judge for each domain, as the shipped ones were
"""

import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import load_model_file, load_strictly, load_tensors, save_tensors, to_half
from common.cli import Parser, progress, run
from common.data import Batch, LabelledImages, jitter, shuffled_indices, to_unit_range
from common.output import check_output_folder
from common.training_options import TrainingOptions
from p1_ddpm.digits import DATA, ROOT, read_digits

IMAGE_SIZE = 28
WIDTHS = (32, 64, 128)
WEIGHTS = Path(__file__).resolve().parent / "weights"
# How often a judge sees each image of its domain; SVHN has fewer.
EPOCHS = {"mnistm": 3, "svhn": 40}


class JudgeBlock(nn.Module):
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
    """Classifies one domain's digits; `widths` are the channels at full, half and quarter resolution."""

    def __init__(self, num_labels: int = 10, widths: Sequence[int] = WIDTHS, dropout: float = 0.2):
        super().__init__()
        self.about: dict[str, Any] = {"config": {"num_labels": num_labels, "widths": widths, "dropout": dropout}}
        fine, middle, coarse = widths
        self.body = nn.Sequential(
            nn.Conv2d(3, fine, 3, padding=1, bias=False),
            nn.BatchNorm2d(fine),
            nn.ReLU(),
            JudgeBlock(fine, middle, 2),
            JudgeBlock(middle, middle, 1),
            JudgeBlock(middle, coarse, 2),
            JudgeBlock(coarse, coarse, 1),
        )
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(coarse, num_labels)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, before dropout: images (N, 3, 28, 28) in [-1, 1] -> (N, widths[-1])."""
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


def judge_path(folder: Path, domain: str) -> Path:
    """The file of a domain's judge."""
    return Path(folder) / f"judge_{domain}.safetensors"


def load_judge(folder: Path, domain: str) -> Judge:
    """The judge of a domain, in eval mode; `judge.about` has its file's facts, such as `held_out_accuracy`."""
    path = judge_path(folder, domain)
    state, about = load_model_file(path, "Judge")
    judge = Judge(**about["config"])
    load_strictly(judge, state, str(path))
    judge.about = about
    return judge.eval()


def load_classifier(path: Path) -> LeNet:
    """The course's `Classifier.pth`: a `LeNet`'s weights, bare or one level down; a `UserError` if they don't fit."""
    model = LeNet()
    load_strictly(model, load_tensors(path)[0], str(path))
    return model.eval()


@torch.inference_mode()
def apply_in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Call a function, a batch at a time, on uint8 images (N, 3, H, W), which it gets in [-1, 1]; joins the results."""
    return torch.cat([function(to_unit_range(part)) for part in progress(images.split(500), "judging", "part")])


def find_correct(model: nn.Module, images: LabelledImages) -> Tensor:
    """1 for an image that the model reads as its label, else 0: float64 (N,), whose mean is the accuracy."""
    return (apply_in_batches(model, images.images).argmax(dim=1) == images.labels).double()


def distort(images: Tensor, generator: torch.Generator, turn: float = 10, zoom: float = 0.12) -> Tensor:
    """Each image (N, C, H, W) turned and slanted by up to `turn` degrees and stretched by up to a share `zoom`.

    Edges are repeated; nothing is mirrored.
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


def tint(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images whose colour channels are scaled by up to a fifth; half of them become their negative."""
    n, channels = images.shape[:2]
    gain = 1 + 0.2 * (torch.rand(n, channels, 1, 1, generator=generator) * 2 - 1)
    sign = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 2 - 1
    return (images * gain * sign).clamp(-1, 1)


def train_judge(
    domain: str, images: LabelledImages, epochs: float, folder: Path, widths: Sequence[int] = WIDTHS, **changed
) -> Path:
    """Train a domain's judge on the training part of `images.split()`; returns the file of its weights.

    Each image is seen `epochs` times; `changed` are fields of `TrainingOptions` that differ from the shipped judges'.
    The file's facts hold `held_out_accuracy` (0 to 1), measured once on the `held_out` (how many) other images.
    """
    from common.training import Trainer  # here, because judging needs none of what it imports

    train, held = images.split()
    batch_size = changed.setdefault("batch_size", 128)
    steps = max(1, round(epochs * len(train) / batch_size))
    usual = {"lr": 4e-3, "weight_decay": 0.05, "warmup": steps // 8, "clip": 5.0, "ema": 0.99}
    usual |= {"decay": "cosine", "decay_fraction": 0.85, "save_every": steps, "steps": steps}
    options = TrainingOptions(**usual | changed)

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(train), options.seed, step * batch_size, batch_size)
        distorted = jitter(distort(to_unit_range(train.images[index]), generator), generator, shift=2, contrast=0.3)
        return {"images": tint(distorted, generator), "labels": train.labels[index]}

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        # No label smoothing: it would crowd each class's features together, and recall is measured on those.
        return F.cross_entropy(model(images).float(), batch["labels"])

    options.seed_weights()
    judge = Judge(widths=widths)
    about = judge.about | {"kind": "Judge", "domain": domain, "image_size": IMAGE_SIZE}
    with tempfile.TemporaryDirectory() as states:  # its training states are not kept
        trainer = Trainer(
            model=judge, options=options, folder=Path(states), about=about, make_batch=make_batch, loss_fn=loss_fn
        )
        averaged = trainer.run().to("cpu")
    state = to_half(averaged.state_dict())
    averaged.load_state_dict(state)  # measured as it will be loaded: from fp16 weights
    about |= {"held_out_accuracy": find_correct(averaged, held).mean().item(), "held_out": len(held)}
    about |= {"trained_on": len(train), "epochs": epochs, "training": asdict(options)}
    path = judge_path(folder, domain)
    save_tensors(path, state, about)
    return path


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="judge.py", description=__doc__)
    group = parser.add_argument_group("training")
    group.add_argument("--data", type=Path, default=DATA, help="the course's digits folder")
    group.add_argument("--out", type=Path, default=ROOT / "runs" / "judges", help="folder for the judges' weights")
    group.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Train a judge for each domain of the data; returns their files."""
    check_output_folder(args.out)
    paths = []
    for domain, images in read_digits(args.data, IMAGE_SIZE).items():
        paths.append(train_judge(domain, images, EPOCHS[domain], args.out, device=args.device))
        about = load_judge(args.out, domain).about
        print(f"{paths[-1]}: {100 * about['held_out_accuracy']:.2f} % of {about['held_out']} held-out images right")
    return paths


if __name__ == "__main__":
    run(main, parse_arguments())

"""Train the Context-UNet on labelled images, by default the course's digits.

    python train.py --data hw2_data/digits            # both domains
    python train.py --csv flowers/train.csv --image-size 64

Running the same command again resumes where the run stopped.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from common.checkpoint import half, save_tensors
from common.data import LabelledImages, jitter, read_csv_images, shuffled_indices, stratified_timesteps, to_unit_range
from common.errors import Parser, UserError, run
from common.runtime import seeded_generator
from common.schedule import PREDICTIONS, SCHEDULES, NoiseSchedule
from common.training import Batch, Trainer, TrainingOptions, add_training_arguments, training_options
from p1_ddpm.digits import DOMAINS, LAYOUTS, joint_label, read_digits
from p1_ddpm.model import ContextUNet, ContextUNetConfig

ROOT = Path(__file__).resolve().parent.parent


class DigitBatches:
    """Draws the batches: every domain equally often, labels dropped now and then, timesteps stratified.

    Args:
        sets: images by domain.
        domains: how many labels each domain has, in the order of the joint classes.
        schedule: where timesteps come from.
        batch_size: images a batch.
        drop: probability that a label becomes the null label (Ho and Salimans 2022, algorithm 1).
        augment: domains whose images are jittered.
        seed: of the order in which images come.
    """

    def __init__(
        self,
        sets: dict[str, LabelledImages],
        domains: dict[str, int],
        schedule: NoiseSchedule,
        batch_size: int,
        drop: float,
        augment: tuple[str, ...],
        seed: int,
    ):
        self.sets, self.schedule, self.drop, self.augment, self.seed = sets, schedule, drop, augment, seed
        self.offsets = {name: joint_label(domains, name, 0) for name in sets}
        self.null_label = sum(domains.values())
        # Near-equal shares that add up to the batch size.
        bounds = [round(batch_size * k / len(sets)) for k in range(len(sets) + 1)]
        self.shares = {name: after - before for name, before, after in zip(sets, bounds, bounds[1:])}

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        x0, labels = [], []
        for name, images in self.sets.items():
            share = self.shares[name]
            index = shuffled_indices(len(images), self.seed, step * share, share)
            pixels = to_unit_range(images.images[index])
            x0.append(jitter(pixels, generator) if name in self.augment else pixels)
            labels.append(images.labels[index] + self.offsets[name])
        x0, labels = torch.cat(x0), torch.cat(labels)
        dropped = torch.rand(len(labels), generator=generator) < self.drop
        # Domains are interleaved, so that every process of a shared batch sees both.
        order = torch.randperm(len(labels), generator=generator)
        return {
            "x0": x0[order],
            "labels": torch.where(dropped, self.null_label, labels)[order],
            "t": stratified_timesteps(len(labels), self.schedule.T, generator),
            "eps": torch.randn(x0.shape, generator=generator),
        }


def diffusion_loss(model: nn.Module, batch: Batch, schedule: NoiseSchedule, prediction: str, gamma: float) -> Tensor:
    """Squared error of the prediction, weighted by min-SNR (Hang et al. 2023); `gamma` 0 leaves it unweighted."""
    xt = schedule.add_noise(batch["x0"], batch["eps"], batch["t"])
    target = schedule.target(batch["x0"], batch["eps"], batch["t"], prediction)
    output = model(xt, batch["t"], batch["labels"]).float()
    error = (output - target).square().mean(dim=(1, 2, 3))
    if gamma:
        error = error * schedule.min_snr_weight(batch["t"], prediction, gamma)
    return error.mean()


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default=ROOT / "hw2_data" / "digits", help="folder with mnistm/ and/or svhn/"
    )
    data.add_argument("--csv", type=Path, help="any CSV with image_name,label instead of the digits")
    data.add_argument("--layout", choices=LAYOUTS, default="2024", help="keep this edition's digits (2024: all)")
    data.add_argument("--image-size", type=int, default=28, help="side of the images, divisible by 4")
    data.add_argument(
        "--augment", nargs="*", default=["svhn"], help="domains to jitter (moves and contrast, no mirror)"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--widths", type=int, nargs="+", default=list(ContextUNetConfig.widths), help="channels by level"
    )
    model.add_argument("--blocks", type=int, nargs="+", default=list(ContextUNetConfig.blocks), help="blocks by level")
    model.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="noise schedule")
    model.add_argument("--prediction", choices=PREDICTIONS, default="v", help="what the network predicts")
    model.add_argument("--min-snr-gamma", type=float, default=5.0, help="loss weighting; 0 for none")
    model.add_argument("--label-drop", type=float, default=0.15, help="part of the labels dropped for guidance")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "p1", help="folder of the run")
    add_training_arguments(parser)
    return parser.parse_args(argv)


def read_sets(args) -> tuple[dict[str, LabelledImages], dict[str, int]]:
    """The images to train on, by domain, and how many labels each domain has."""
    if args.csv:
        name = args.csv.resolve().parent.name
        images = read_csv_images(args.csv, args.image_size)
        return {name: images}, {name: int(images.labels.max()) + 1}
    return read_digits(args.data, args.layout, args.image_size), dict(DOMAINS)


def main(args) -> Path:
    """Train; returns the path of the finished weights (fp16, averaged), `OUT/model.safetensors`."""
    options: TrainingOptions = training_options(args)
    sets, domains = read_sets(args)
    parts = {name: images.split() for name, images in sets.items()}
    config = ContextUNetConfig(num_labels=sum(domains.values()), widths=args.widths, blocks=args.blocks)
    if args.image_size % config.stride:
        raise UserError(f"--image-size {args.image_size}: must be divisible by {config.stride}")
    schedule = NoiseSchedule(args.schedule)
    batches = DigitBatches(
        {name: train for name, (train, _) in parts.items()},
        domains, schedule, options.batch_size, args.label_drop, tuple(args.augment), options.seed,
    )  # fmt: skip
    held_out = DigitBatches({name: held for name, (_, held) in parts.items()}, domains, schedule, 256, 0.0, (), 0)
    validation_batch = held_out(0, seeded_generator(0, 3))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return diffusion_loss(model, batch, schedule, args.prediction, args.min_snr_gamma)

    about = {
        "kind": "ContextUNet",
        "config": asdict(config),
        "schedule": asdict(schedule),
        "prediction": args.prediction,
        "domains": domains,
        "image_size": args.image_size,
    }
    torch.manual_seed(options.seed)
    model = ContextUNet(config)

    def validate(averaged: nn.Module) -> float:
        device = next(averaged.parameters()).device
        with torch.no_grad(), trainer.accelerator.autocast():
            return float(loss_fn(averaged, {name: t.to(device) for name, t in validation_batch.items()}))

    trainer = Trainer(model, options, args.out, about, batches, loss_fn, validate)
    averaged = trainer.run()
    path = args.out / "model.safetensors"
    if trainer.accelerator.is_main_process:
        facts = about | {"step": trainer.step, "training": asdict(options), "validation_loss": validate(averaged)}
        save_tensors(path, half(averaged.state_dict()), facts)
    return path


if __name__ == "__main__":
    run(main, parse_arguments())

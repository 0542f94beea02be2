"""Train the Context-UNet on labelled images, by default the course's digits.

python train.py --data hw2_data/digits                  # both domains
python train.py --csv flowers/train.csv --image-size 64 # any other CSV with image_name,label

Run the same command again to resume a run where it stopped.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor, nn

from common.checkpoint import start_from
from common.cli import Parser, UserError, add_options, check, option, options_from, run
from common.data import (
    HELD_OUT_EVERY,
    LabelledImages,
    jitter,
    read_csv_images,
    shuffled_indices,
    stratified_timesteps,
    to_unit_range,
)
from common.images import grid, to_uint8
from common.runtime import seeded_generator
from common.sampling import Denoiser, ImageNoise, draw
from common.schedule import PREDICTIONS, SCHEDULES, NoiseSchedule
from common.training import Batch, Trainer, diffusion_loss, loss_of, save_half
from common.training_options import TrainingOptions, add_training_arguments, training_options
from p1_ddpm.digits import DATA, DOMAINS, LAYOUTS, ROOT, joint_label, keep_layout, read_digits
from p1_ddpm.model import ContextUNet, ContextUNetConfig

Sets = dict[str, LabelledImages]  # by domain


@dataclass(frozen=True)
class DigitTraining:
    """What to train, on which images; every field is a flag of the same name. A bad value is a `UserError`."""

    out: Path = option(ROOT / "runs" / "p1", "folder of the run: states, logs, samples and weights")
    init: Path | None = option(None, "weights to start from; ignored when a run is resumed", type=Path)
    data: Path = option(DATA, "the course's digits folder, which holds mnistm/, svhn/ or both")
    csv: Path | None = option(None, "train on this CSV (image_name,label) instead of the digits", type=Path)
    layout: str = option("2024", "train on the digits of this edition; 2024 has all of them", choices=LAYOUTS)
    image_size: int = option(28, "side of the images in pixels, divisible by 4")
    augment: Sequence[str] | None = option(
        None, "domains whose images are jittered (default: svhn, if there)", type=str, nargs="*", metavar="DOMAIN"
    )
    weights: Sequence[str] = option(
        (), "how often a domain is drawn; the others have weight 1", type=str, nargs="+", metavar="DOMAIN=W"
    )
    widths: Sequence[int] = option(ContextUNetConfig.widths, "channels of each level of the U-Net", type=int, nargs="+")
    blocks: Sequence[int] = option(ContextUNetConfig.blocks, "residual blocks of each level", type=int, nargs="+")
    schedule: str = option("cosine", "noise schedule", choices=SCHEDULES)
    prediction: str = option("v", "what the network predicts", choices=PREDICTIONS)
    min_snr_gamma: float = option(5.0, "cap of the min-SNR loss weights; 0 turns them off")
    label_drop: float = option(0.15, "share of labels that are dropped; guidance needs some")

    def __post_init__(self):
        check("label_drop", self.label_drop, 0 <= self.label_drop <= 1, "between 0 and 1")
        check("min_snr_gamma", self.min_snr_gamma, self.min_snr_gamma >= 0, "at least 0")

    def network(self, num_labels: int) -> ContextUNetConfig:
        """The network; raises a `UserError` if its sizes do not fit one another or the images."""
        attention = [False] * len(self.widths)
        try:
            config = ContextUNetConfig(num_labels, widths=self.widths, blocks=self.blocks, attention=attention)
        except ValueError as error:
            raise UserError(f"--widths, --blocks: {error}") from None
        fits = self.image_size >= config.stride and self.image_size % config.stride == 0
        check("image_size", self.image_size, fits, f"divisible by {config.stride}")
        return config


@dataclass
class DigitBatches:
    """Makes the training batches: each domain gets its share, and some labels are dropped for guidance."""

    sets: Sets
    domains: Mapping[str, int]  # how many labels each domain has, in the order of the joint classes
    schedule: NoiseSchedule  # where timesteps come from
    batch_size: int
    drop: float = 0.0  # probability that a label becomes the null label (Ho and Salimans 2022, algorithm 1)
    augment: Sequence[str] = ()  # domains whose images are jittered
    seed: int = 0  # of the order in which images come
    weights: Mapping[str, float] = field(default_factory=dict)  # how often each domain comes, relative to 1

    def __post_init__(self):
        # Rounded at their bounds, the shares add up to the batch size.
        so_far = list(accumulate((self.weights.get(name, 1.0) for name in self.sets), initial=0.0))
        bounds = [round(self.batch_size * weight / so_far[-1]) for weight in so_far]
        self.shares = {name: after - before for name, before, after in zip(self.sets, bounds, bounds[1:])}

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of a step: `x0` in [-1, 1] and `eps`, (N, 3, H, W), and joint `labels` and timesteps `t`, (N,)."""
        x0, labels = [], []
        for name, images in self.sets.items():
            share = self.shares[name]
            index = shuffled_indices(len(images), self.seed, step * share, share)
            pixels = to_unit_range(images.images[index])
            x0.append(jitter(pixels, generator) if name in self.augment else pixels)
            labels.append(images.labels[index] + joint_label(self.domains, name, 0))
        x0, labels = torch.cat(x0), torch.cat(labels)
        dropped = torch.rand(len(labels), generator=generator) < self.drop
        # Shuffled, so that every process that shares the batch sees both domains.
        order = torch.randperm(len(labels), generator=generator)
        return {
            "x0": x0[order],
            "labels": torch.where(dropped, sum(self.domains.values()), labels)[order],  # one past the last class: null
            "t": stratified_timesteps(len(labels), self.schedule.T, generator),
            "eps": torch.randn(x0.shape, generator=generator),
        }


def read_sets(config: DigitTraining) -> tuple[Sets, Sets, dict[str, int]]:
    """Training images and held-out images by domain, and how many labels each domain has.

    A `UserError` if a file is bad, or there are too few images to hold some out.
    """
    if config.csv:
        name, images = config.csv.resolve().parent.name, read_csv_images(config.csv, config.image_size)
        sets, domains = {name: images}, {name: int(images.labels.max()) + 1}
    else:
        sets, domains = read_digits(config.data, config.image_size), dict(DOMAINS)
    train, held_out = {}, {}
    for name, images in sets.items():
        if len(images) < HELD_OUT_EVERY:
            source = config.csv or config.data
            raise UserError(f"{source}: {len(images)} images of {name}; give at least {HELD_OUT_EVERY}")
        # The split comes first: models of all layouts then share one held-out part.
        parts = images.split()
        if not config.csv:
            parts = [keep_layout(part, name, config.layout) for part in parts]
        if not all(len(part) for part in parts):
            raise UserError(f"--layout {config.layout}: leaves too few images of {name} to hold some out; give more")
        train[name], held_out[name] = parts
    return train, held_out, domains


def domain_weights(arguments: Sequence[str], domains: Sequence[str]) -> dict[str, float]:
    """How often each domain is drawn: the weights that `domain=weight` arguments give, and 1 for the others."""
    weights = dict.fromkeys(domains, 1.0)
    for argument in arguments:
        name, _, number = argument.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if name not in weights or not 0 < weight < float("inf"):
            raise UserError(f"--weights {argument}: must be DOMAIN=W with W above 0 and one of {', '.join(domains)}")
        weights[name] = weight
    return weights


def train(
    config: DigitTraining, options: TrainingOptions, make_model: Callable[[ContextUNetConfig], nn.Module] = ContextUNet
) -> Path:
    """Train a network, or resume its run; returns its EMA weights, `config.out/model.safetensors`."""
    train_sets, held_out, domains = read_sets(config)
    network = config.network(sum(domains.values()))
    weights = domain_weights(config.weights, list(train_sets))
    augment = config.augment if config.augment is not None else [name for name in train_sets if name == "svhn"]
    if unknown := [name for name in augment if name not in train_sets]:
        raise UserError(f"--augment {unknown[0]}: no such domain; choose from {', '.join(train_sets)}")
    schedule = NoiseSchedule(config.schedule)
    batches = DigitBatches(
        train_sets, domains, schedule, options.batch_size, config.label_drop, augment, options.seed, weights
    )
    validation_batch = DigitBatches(held_out, domains, schedule, 256)(0, seeded_generator(0, 3))
    loss_fn = partial(diffusion_loss, schedule=schedule, prediction=config.prediction, gamma=config.min_snr_gamma)
    shown = [joint_label(domains, name, digit) for name in train_sets for digit in range(min(10, domains[name]))]

    def sample(averaged: nn.Module) -> Tensor:
        labels = torch.tensor(shown, device=next(averaged.parameters()).device)
        null = torch.full_like(labels, network.num_labels)
        fixed_noise = ImageNoise([(0, k) for k in range(len(shown))])
        xt = fixed_noise.draw((network.image_channels, config.image_size, config.image_size), labels.device)
        denoise = Denoiser(averaged, schedule, config.prediction, {"labels": labels}, {"labels": null}, 2.0)
        drawn = draw(denoise, schedule, xt, schedule.timesteps(10), "dpm-solver++")
        return grid(to_uint8(drawn), len(shown) // len(train_sets), scale=2)

    about = {"kind": "ContextUNet", "config": asdict(network), "schedule": asdict(schedule)}
    about |= {"prediction": config.prediction, "domains": domains, "image_size": config.image_size}
    notes = {"augment": augment, "weights": weights, "init": str(config.init) if config.init else None}
    notes |= {"layout": config.layout, "label_drop": config.label_drop, "min_snr_gamma": config.min_snr_gamma}
    options.seed_weights()
    model = make_model(network)
    if config.init:
        start_from(model, config.init, about)
    trainer = Trainer(
        model=model,
        options=options,
        folder=config.out,
        about=about,
        make_batch=batches,
        loss_fn=loss_fn,
        validate=loss_of(validation_batch, loss_fn),
        sample=sample,
        notes=notes,
    )
    path = config.out / "model.safetensors"
    trainer.finish(save_half(path))
    return path


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    add_options(parser.add_argument_group("run, data and model"), DigitTraining)
    add_training_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> Path:
    """Train as the arguments say; returns the finished weights."""
    return train(options_from(args, DigitTraining), training_options(args))


if __name__ == "__main__":
    run(main, parse_arguments())

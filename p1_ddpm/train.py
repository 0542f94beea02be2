"""Train the Context-UNet on labelled images, by default the course's digits.

python train.py --data hw2_data/digits                  # both domains
python train.py --csv flowers/train.csv --image-size 64 # any other CSV with image_name,label

Run the same command again to resume a run where it stopped.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
MODEL_FLAGS = ("widths", "blocks", "schedule", "prediction", "min_snr_gamma", "label_drop")


@dataclass(frozen=True)
class DigitTraining:
    """What to train, on which images; every field is a flag of the same name.

    Raises:
        UserError: a value is out of its range.
    """

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

    Raises:
        UserError: a file is bad, or there are too few images to hold some out.
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


def model_config(config: DigitTraining, num_labels: int) -> ContextUNetConfig:
    """The network's sizes, once they are known to fit one another and the images."""
    attention = [False] * len(config.widths)
    try:
        sizes = ContextUNetConfig(num_labels, widths=config.widths, blocks=config.blocks, attention=attention)
    except ValueError as error:
        raise UserError(f"--widths, --blocks: {error}") from None
    size, stride = config.image_size, sizes.stride
    check("image_size", size, size >= stride and size % stride == 0, f"divisible by {stride}")
    return sizes


def draw_samples(model: ContextUNet, labels: Sequence[int], size: int, schedule: NoiseSchedule, prediction: str):
    """Draw an image of each label, always from the same noise, to watch a model learn: uint8 (N, 3, size, size)."""
    labels = torch.tensor(labels, device=next(model.parameters()).device)
    condition, null = {"labels": labels}, {"labels": torch.full_like(labels, model.null_label)}
    noise = ImageNoise([(0, k) for k in range(len(labels))])
    xt = noise.draw((model.config.image_channels, size, size), labels.device)
    denoise = Denoiser(model, schedule, prediction, condition, null, guidance_scale=2.0)
    return to_uint8(draw(denoise, schedule, xt, schedule.timesteps(10), "dpm-solver++"))


def train(
    config: DigitTraining,
    options: TrainingOptions,
    make_model: Callable[[ContextUNetConfig], nn.Module] = ContextUNet,
    save: Callable[[Path], Callable] = save_half,
) -> Path:
    """Train a network, or resume its run; returns its EMA weights, `config.out/model.safetensors`.

    Args:
        config: what to train, on which images.
        options: how to train.
        make_model: from sizes to the network.
        save: from a path to what writes the EMA weights there; see `Trainer.finish`.

    Raises:
        UserError: bad arguments or data, a loss that is not finite, or a full disk.
    """
    train_sets, held_out, domains = read_sets(config)
    sizes = model_config(config, sum(domains.values()))
    weights = domain_weights(config.weights, list(train_sets))
    augment = config.augment if config.augment is not None else [name for name in train_sets if name == "svhn"]
    if unknown := [name for name in augment if name not in train_sets]:
        raise UserError(f"--augment {unknown[0]}: no such domain; choose from {', '.join(train_sets)}")
    schedule = NoiseSchedule(config.schedule)
    batches = DigitBatches(
        train_sets, domains, schedule, options.batch_size, config.label_drop, augment, options.seed, weights
    )
    validation_batch = DigitBatches(held_out, domains, schedule, 256)(0, seeded_generator(0, 3))
    shown = [joint_label(domains, name, digit) for name in train_sets for digit in range(min(10, domains[name]))]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return diffusion_loss(model, batch, schedule, config.prediction, config.min_snr_gamma)

    def sample(averaged: nn.Module) -> Tensor:
        images = draw_samples(averaged, shown, config.image_size, schedule, config.prediction)
        return grid(images, len(shown) // len(train_sets), scale=2)

    about = {
        "kind": "ContextUNet",
        "config": asdict(sizes),
        "schedule": asdict(schedule),
        "prediction": config.prediction,
        "domains": domains,
        "image_size": config.image_size,
    }
    notes = {"augment": augment, "weights": weights, "init": str(config.init) if config.init else None}
    notes |= {name: getattr(config, name) for name in ("layout", "label_drop", "min_snr_gamma")}
    torch.manual_seed(options.seed)
    model = make_model(sizes)
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
    trainer.finish(save(path))
    return path


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    others = [name for name in DigitTraining.__dataclass_fields__ if name not in MODEL_FLAGS]
    add_options(parser.add_argument_group("run and data"), DigitTraining, leave_out=MODEL_FLAGS)
    add_options(parser.add_argument_group("model"), DigitTraining, leave_out=others)
    add_training_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> Path:
    """Train as the arguments say; returns the finished weights."""
    options = training_options(args)
    return train(options_from(args, DigitTraining), options)


if __name__ == "__main__":
    run(main, parse_arguments())

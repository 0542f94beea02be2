"""Train the Context-UNet on labelled images, by default the course's digits.

python train.py --data hw2_data/digits                  # both domains
python train.py --csv flowers/train.csv --image-size 64 # any other CSV with image_name,label

Running the same command again resumes where the run stopped.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from common.checkpoint import half, save_tensors, start_from
from common.cli import Parser, UserError, run
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
from common.sampling import ImageNoise, draw, guided
from common.schedule import PREDICTIONS, SCHEDULES, NoiseSchedule
from common.training import Batch, Trainer, diffusion_loss, loss_of
from common.training_options import add_training_arguments, training_options
from p1_ddpm.digits import DOMAINS, LAYOUTS, joint_label, of_layout, read_digits
from p1_ddpm.model import ContextUNet, ContextUNetConfig

ROOT = Path(__file__).resolve().parent.parent


class DigitBatches:
    """Draws the batches: fixed shares of the domains, labels dropped now and then, timesteps stratified.

    Args:
        sets: images by domain.
        domains: how many labels each domain has, in the order of the joint classes.
        schedule: where timesteps come from.
        batch_size: images a batch.
        drop: probability that a label becomes the null label (Ho and Salimans 2022, algorithm 1).
        augment: domains whose images are jittered.
        seed: of the order in which images come.
        weights: how often each domain comes, relative to the others; all equally by default.
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
        weights: Mapping[str, float] | None = None,
    ):
        self.sets, self.schedule, self.drop, self.augment, self.seed = sets, schedule, drop, augment, seed
        self.offsets = {name: joint_label(domains, name, 0) for name in sets}
        self.null_label = sum(domains.values())
        # Rounded at their bounds, the shares add up to the batch size.
        so_far = list(accumulate(((weights or {}).get(name, 1.0) for name in sets), initial=0.0))
        bounds = [round(batch_size * weight / so_far[-1]) for weight in so_far]
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


def sample_grid(
    model: nn.Module, labels: Sequence[int], columns: int, image_size: int, schedule: NoiseSchedule, prediction: str
) -> Tensor:
    """Samples of these labels from always the same noise, to watch a model learn: uint8 (3, height, width)."""
    device = next(model.parameters()).device
    condition = {"labels": torch.tensor(labels, device=device)}
    null_condition = {"labels": torch.full_like(condition["labels"], model.null_label)}
    noise = ImageNoise([(0, k) for k in range(len(labels))])
    xt = noise.draw((model.config.image_channels, image_size, image_size), device)
    denoise = guided(model, condition, null_condition, guidance_scale=2.0)
    images = draw(denoise, schedule, xt, schedule.timesteps(10), prediction, method="dpm-solver++")
    return grid(to_uint8(images), columns, scale=2)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    files = parser.add_argument_group("run")
    files.add_argument("--out", type=Path, default=ROOT / "runs" / "p1", help="folder of the run")
    files.add_argument("--init", type=Path, help="weights to start from; a resumed run has its own")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default=ROOT / "hw2_data" / "digits", help="folder with mnistm/ and/or svhn/"
    )
    data.add_argument("--csv", type=Path, help="any CSV with image_name,label instead of the digits")
    data.add_argument("--layout", choices=LAYOUTS, default="2024", help="keep this edition's digits (2024: all)")
    data.add_argument("--image-size", type=int, default=28, help="side of the images, divisible by 4")
    data.add_argument("--augment", nargs="*", metavar="DOMAIN", help="domains to jitter (default: svhn if it is there)")
    data.add_argument(
        "--weights", nargs="+", default=[], metavar="DOMAIN=W", help="how often a domain is drawn (default: each 1)"
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
    add_training_arguments(parser)
    return parser.parse_args(argv)


def read_sets(args) -> tuple[dict[str, LabelledImages], dict[str, int]]:
    """The images to train on, by domain, and how many labels each domain has.

    Raises:
        UserError: a file is bad, or there are too few images to hold some out.
    """
    if args.csv:
        name = args.csv.resolve().parent.name
        images = read_csv_images(args.csv, args.image_size)
        sets, domains = {name: images}, {name: int(images.labels.max()) + 1}
    else:
        sets, domains = read_digits(args.data, args.image_size), dict(DOMAINS)
    for name, images in sets.items():
        if len(images) < HELD_OUT_EVERY:
            raise UserError(f"{args.csv or args.data}: {len(images)} images of {name}; give at least {HELD_OUT_EVERY}")
    return sets, domains


def augmented_domains(wanted: Sequence[str] | None, domains: Sequence[str]) -> tuple[str, ...]:
    """The domains to jitter: the wanted ones, else svhn if it is there.

    Raises:
        UserError: a wanted domain is not there.
    """
    if wanted is None:
        return tuple(name for name in domains if name == "svhn")
    if unknown := [name for name in wanted if name not in domains]:
        raise UserError(f"--augment {unknown[0]}: no such domain; choose from {', '.join(domains)}")
    return tuple(wanted)


def domain_weights(wanted: Sequence[str], domains: Sequence[str]) -> dict[str, float]:
    """The weights that `domain=weight` arguments give; 1 for the domains they leave out.

    Raises:
        UserError: an argument has another form, names no domain of these, or its weight is not above 0.
    """
    weights = dict.fromkeys(domains, 1.0)
    for argument in wanted:
        name, _, number = argument.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if name not in weights or not 0 < weight < float("inf"):
            raise UserError(f"--weights {argument}: must be DOMAIN=W with W above 0 and one of {', '.join(domains)}")
        weights[name] = weight
    return weights


def model_config(args) -> ContextUNetConfig:
    """The network that the arguments describe, but for its number of labels.

    Raises:
        UserError: the sizes do not fit one another or the images.
    """
    try:
        config = ContextUNetConfig(widths=args.widths, blocks=args.blocks, attention=[False] * len(args.widths))
    except ValueError as error:
        raise UserError(f"--widths, --blocks: {error}") from None
    if args.image_size < config.stride or args.image_size % config.stride:
        raise UserError(f"--image-size {args.image_size}: must be divisible by {config.stride}")
    return config


def main(args) -> Path:
    """Train; returns the path of the finished weights (fp16, averaged), `OUT/model.safetensors`.

    Raises:
        UserError: bad arguments or data, a loss that is not finite, or a full disk.
    """
    options = training_options(args)
    if not 0 <= args.label_drop <= 1:
        raise UserError(f"--label-drop {args.label_drop}: must be between 0 and 1")
    if not args.min_snr_gamma >= 0:
        raise UserError(f"--min-snr-gamma {args.min_snr_gamma}: must be at least 0")
    config = model_config(args)
    sets, domains = read_sets(args)
    config = replace(config, num_labels=sum(domains.values()))
    schedule = NoiseSchedule(args.schedule)
    augment = augmented_domains(args.augment, list(sets))
    weights = domain_weights(args.weights, list(sets))
    # The split comes first: the models of all layouts then share one held-out part.
    parts = {name: images.split() for name, images in sets.items()}
    train, held_out = ({name: pair[k] for name, pair in parts.items()} for k in (0, 1))
    if not args.csv:
        train, held_out = (
            {name: of_layout(images, name, args.layout) for name, images in part.items()} for part in (train, held_out)
        )
        if empty := [name for name in sets if not (len(train[name]) and len(held_out[name]))]:
            raise UserError(f"--layout {args.layout}: leaves too few images of {empty[0]} to hold some out; give more")
    batches = DigitBatches(
        train, domains, schedule, options.batch_size, args.label_drop, augment, options.seed, weights
    )
    held_out_batches = DigitBatches(held_out, domains, schedule, 256, drop=0.0, augment=(), seed=0)
    validation_batch = held_out_batches(0, seeded_generator(0, 3))
    firsts = {name: joint_label(domains, name, 0) for name in sets}
    shown = [first + digit for name, first in firsts.items() for digit in range(min(10, domains[name]))]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return diffusion_loss(model, batch, schedule, args.prediction, args.min_snr_gamma)

    def sample(averaged: nn.Module) -> Tensor:
        return sample_grid(averaged, shown, len(shown) // len(sets), args.image_size, schedule, args.prediction)

    about = {
        "kind": "ContextUNet",
        "config": asdict(config),
        "schedule": asdict(schedule),
        "prediction": args.prediction,
        "domains": domains,
        "image_size": args.image_size,
    }
    notes = {"augment": augment, "weights": weights} | {
        name: getattr(args, name) for name in ("layout", "label_drop", "min_snr_gamma")
    }
    notes["init"] = str(args.init) if args.init else None
    torch.manual_seed(options.seed)
    model = ContextUNet(config)
    if args.init:
        start_from(model, args.init, about)
    validate = loss_of(validation_batch, loss_fn)
    trainer = Trainer(model, options, args.out, about, batches, loss_fn, validate, sample, notes)
    averaged = trainer.run()
    path = args.out / "model.safetensors"
    if trainer.accelerator.is_main_process:
        save_tensors(path, half(averaged.state_dict()), trainer.facts())
    trainer.accelerator.end_training()
    return path


if __name__ == "__main__":
    run(main, parse_arguments())

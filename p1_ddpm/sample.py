"""Draw digits into the folders that the course's grader reads.

python sample.py OUT                                  # Fall 2025: 50 of each even mnistm and odd svhn digit
python sample.py OUT --layout 2024 --seed 3           # Fall 2024: 50 of all ten digits in both folders
python sample.py OUT --classes 3 7 --count 8 --guidance-scale 1
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from common.checkpoint import load_model_file, load_strictly
from common.cli import Parser, Progress, UserError, run, say
from common.images import check_finite, clear_way, staged, to_pil, to_uint8
from common.runtime import PRECISIONS, Processes, autocast, pick_device, pick_precision
from common.sampling import METHODS, ImageNoise, draw, guided
from common.schedule import NoiseSchedule
from p1_ddpm.digits import DOMAINS, LAYOUTS, joint_label
from p1_ddpm.model import ContextUNet, ContextUNetConfig

# Matrix libraries sum in another order for very few rows, which can move a pixel by one level; so few are filled up.
SMALLEST_BATCH = 16
WEIGHTS = Path(__file__).resolve().parent / "weights" / "digits.safetensors"


@dataclass(frozen=True)
class Digit:
    """One image to draw: its class, its number among the images of that class, and its file below OUT."""

    domain: str
    label: int
    number: int

    @property
    def file(self) -> str:
        return f"{self.domain}/{self.label}_{self.number:03d}.png"


class DigitSampler:
    """Draws digits from a checkpoint; everything it needs to know is in the file.

    Args:
        weights: a finished model or a training state.
        device: where to compute.
        precision: "fp32", "bf16" or "fp16" for the network.

    Raises:
        UserError: the weights are missing, truncated, or of another model.
    """

    def __init__(self, weights: Path, device: torch.device, precision: str):
        state, self.about = load_model_file(weights, "ContextUNet")
        self.model = ContextUNet(ContextUNetConfig(**self.about["config"]))
        load_strictly(self.model, state, str(weights))
        self.model.eval().to(device, memory_format=torch.channels_last)
        self.schedule = NoiseSchedule(**self.about["schedule"])
        self.domains: dict[str, int] = self.about["domains"]
        self.device, self.precision = device, precision

    def steps(self, digits: Sequence[Digit], seed: int, options: dict[str, Any]):
        """The arguments of `reverse_process` for these digits; see `sampling_options` for the options.

        The noise of a digit is keyed by (seed, class, number): it does not depend on what else is drawn.
        """
        labels = [joint_label(self.domains, digit.domain, digit.label) for digit in digits]
        noise = ImageNoise([(seed, label, digit.number) for label, digit in zip(labels, digits)])
        condition = {"labels": torch.tensor(labels, device=self.device)}
        null = {"labels": torch.full_like(condition["labels"], self.model.null_label)}

        def network(xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            rows = torch.arange(max(len(xt), SMALLEST_BATCH), device=xt.device) % len(xt)
            inputs = xt[rows].contiguous(memory_format=torch.channels_last), t[rows], labels[rows]
            with torch.no_grad(), autocast(self.device, self.precision):
                return self.model(*inputs)[: len(xt)].float()

        size, channels = self.about["image_size"], self.model.config.image_channels
        return {
            "denoise": guided(network, condition, null, options["guidance_scale"], options["guidance_interval"]),
            "schedule": self.schedule,
            "xt": noise.draw((channels, size, size), self.device),
            "timesteps": self.schedule.timesteps(options["steps"], "trailing"),
            "prediction": self.about["prediction"],
            "method": options["sampler"],
            "eta": options["eta"],
            "noise": noise,
            "use_clipped_model_output": True,
        }

    def images(self, digits: Sequence[Digit], seed: int, options: dict[str, Any]) -> Tensor:
        """Draw the digits in one batch: uint8 (N, 3, H, W) on the CPU.

        Raises:
            UserError: an image is not finite.
        """
        images = draw(**self.steps(digits, seed, options))
        check_finite(images, [digit.file for digit in digits], self.precision)
        return to_uint8(images)


def wanted_digits(domains: Mapping[str, int], layout: str, classes: Sequence[int] | None, count: int) -> list[Digit]:
    """The images of a layout in the order of their names, `count` of each class.

    Weights trained on other images than the course's digits have no layouts: all their classes are drawn.

    Raises:
        UserError: a class that the layout's folders do not hold.
    """
    held = LAYOUTS[layout] if domains == DOMAINS else {domain: range(labels) for domain, labels in domains.items()}
    known = sorted(set().union(*held.values()))
    if unknown := set(classes or ()) - set(known):
        raise UserError(f"--classes {min(unknown)}: choose from {known[0]} to {known[-1]}")
    return [
        Digit(domain, label, number)
        for domain, digits in held.items()
        for label in digits
        if classes is None or label in classes
        for number in range(1, count + 1)
    ]


def sampling_options(args, sampler: DigitSampler) -> dict[str, Any]:
    """The part of the arguments that says how to sample.

    Raises:
        UserError: a value out of its range, or more steps than the weights' schedule has.
    """
    if not 1 <= args.steps <= sampler.schedule.T:
        raise UserError(f"--steps {args.steps}: choose from 1 to {sampler.schedule.T}")
    if not 0 <= args.guidance_scale < math.inf or not 0 <= args.eta <= 1:
        raise UserError(f"--guidance-scale {args.guidance_scale} --eta {args.eta}: at least 0, and eta at most 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: seeds are whole numbers from 0")
    names = ("sampler", "steps", "eta", "guidance_scale", "guidance_interval")
    return {name: getattr(args, name) for name in names}


def add_sampling_arguments(parser: Parser) -> None:
    """Flags shared by every script that draws digits."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--weights", type=Path, default=WEIGHTS, help="finished model or training state")
    group.add_argument("--guidance-scale", type=float, default=6.0, help="1 = off")
    group.add_argument("--guidance-interval", type=float, nargs=2, default=(0, 1000), metavar=("LOW", "HIGH"),
                       help="timesteps between which guidance is on")  # fmt: skip
    group.add_argument("--sampler", choices=METHODS, default="dpm-solver++", help="reverse process")
    group.add_argument("--steps", type=int, default=10, help="steps of the reverse process")
    group.add_argument("--eta", type=float, default=0.0, help="fresh noise of ddim: 0 none, 1 as ddpm")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    group.add_argument("--batch-size", type=int, default=100, help="images at a time; does not change them")
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the network")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that gets mnistm/ and svhn/")
    digits = parser.add_argument_group("digits")
    digits.add_argument("--layout", choices=LAYOUTS, default="2025", help="edition of the course")
    digits.add_argument("--classes", type=int, nargs="+", help="only these digits")
    digits.add_argument("--count", type=int, default=50, help="images of each digit and domain")
    digits.add_argument("--overwrite", action="store_true", help="remove other files from OUT's two folders")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def make_sampler(args) -> DigitSampler:
    """The sampler that the arguments describe."""
    device = pick_device(args.device)
    return DigitSampler(args.weights, device, pick_precision(args.precision, device))


def main(args) -> list[Path]:
    """Draw and write; returns the files this process wrote."""
    if args.count < 1 or args.batch_size < 1:
        raise UserError(f"--count {args.count} --batch-size {args.batch_size}: both start at 1")
    sampler = make_sampler(args)
    options = sampling_options(args, sampler)
    digits = wanted_digits(sampler.domains, args.layout, args.classes, args.count)
    processes = Processes()
    if processes.rank == 0:
        clear_way(args.out, [digit.file for digit in digits], args.overwrite)
    processes.wait()
    mine = digits[processes.rank :: processes.count]
    with staged(args.out) as stage, Progress(len(mine), "digits", "image") as phase:
        for start in range(0, len(mine), args.batch_size):
            batch = mine[start : start + args.batch_size]
            for digit, image in zip(batch, sampler.images(batch, args.seed, options)):
                (stage / digit.domain).mkdir(exist_ok=True)
                to_pil(image).save(stage / digit.file)
            phase.update(len(batch))
    processes.wait()
    if processes.rank == 0:
        by = f", drawn by {processes.count} processes" if processes.count > 1 else ""
        say(f"{len(digits)} images in {args.out}{by}")
    return [args.out / digit.file for digit in mine]


if __name__ == "__main__":
    run(main, parse_arguments())

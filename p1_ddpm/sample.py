"""Draw digits into the folders that the course's grader reads.

python sample.py OUT                                  # Fall 2025: 50 of each even mnistm and odd svhn digit
python sample.py OUT --layout 2024 --seed 3           # Fall 2024: 50 of all ten digits in both folders
python sample.py OUT --classes 3 7 --count 8 --guidance-scale 1
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor

from common.checkpoint import load_model_file, load_strictly
from common.cli import Parser, UserError, add_options, check, option, options_from, run, say
from common.images import to_pil, to_uint8
from common.output import clear_way, stage_folder
from common.runtime import PRECISIONS, Processes, autocast, pick_device, pick_precision
from common.sampling import METHODS, Denoiser, ImageNoise, Step, check_finite, draw_in_batches, reverse_process
from common.schedule import NoiseSchedule
from p1_ddpm.digits import DOMAINS, LAYOUTS, Digit, joint_label, wanted_digits
from p1_ddpm.model import ContextUNet, ContextUNetConfig

# With very few rows, matrix libraries sum in another order, which can move a pixel by one level.
SMALLEST_BATCH = 16
WEIGHTS = Path(__file__).resolve().parent / "weights" / "digits.safetensors"


@dataclass(frozen=True)
class DigitOptions:
    """How to draw digits; every field is a flag of the same name. A value out of its range is a `UserError`."""

    guidance_scale: float = option(6.0, "how strongly the class steers the image; 1 turns guidance off")
    guidance_interval: tuple[float, float] = option(
        (0, 1000), "guide only at timesteps between these", type=float, nargs=2, metavar=("LOW", "HIGH")
    )
    sampler: str = option("dpm-solver++", "method of the reverse process", choices=METHODS)
    steps: int = option(10, "steps of the reverse process")
    eta: float = option(0.0, "fresh noise in each step of ddim: 0 for none, 1 for as much as ddpm")
    seed: int = option(0, "seed of the noise; the same seed gives the same images")
    batch_size: int = option(100, "images drawn at a time; they do not depend on it")
    precision: str = option("auto", "precision of the network; auto is bf16 on a CPU that has it", choices=PRECISIONS)
    device: str = option("auto", "where to compute: auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self):
        check("guidance_scale", self.guidance_scale, 0 <= self.guidance_scale < math.inf, "at least 0 and finite")
        check("eta", self.eta, 0 <= self.eta <= 1, "between 0 and 1")
        check("seed", self.seed, self.seed >= 0, "at least 0")
        check("batch_size", self.batch_size, self.batch_size > 0, "above 0")


class DigitSampler:
    """Draws digits from a finished model or a training state; everything it needs to know is in the file.

    A `UserError` if the weights are missing, truncated, or another model's, or there is no such device.
    """

    def __init__(self, weights: Path = WEIGHTS, device: torch.device | str = "auto", precision: str = "auto"):
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        state, self.about = load_model_file(weights, "ContextUNet")
        self.model = ContextUNet(ContextUNetConfig(**self.about["config"]))
        load_strictly(self.model, state, str(weights))
        self.model.eval().to(self.device, memory_format=torch.channels_last)
        self.schedule = NoiseSchedule(**self.about["schedule"])
        self.domains: dict[str, int] = self.about["domains"]
        self.shape = self.model.config.image_channels, self.about["image_size"], self.about["image_size"]

    def predict(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The network's output in fp32, shaped as `xt`; a batch below `SMALLEST_BATCH` repeats itself to fill it."""
        rows = torch.arange(max(len(xt), SMALLEST_BATCH), device=xt.device) % len(xt)
        with autocast(self.device, self.precision):
            output = self.model(xt[rows].contiguous(memory_format=torch.channels_last), t[rows], labels[rows])
        return output[: len(xt)].float()

    def sources(self, digits: Sequence[Digit], options: DigitOptions) -> ImageNoise:
        """The noise of each digit, keyed by (seed, class, number): it does not depend on what else is drawn."""
        return ImageNoise([(options.seed, joint_label(self.domains, d.domain, d.label), d.number) for d in digits])

    def noise(self, digits: Sequence[Digit], options: DigitOptions) -> Tensor:
        """The noise that the digits start from: (N, 3, H, W)."""
        return self.sources(digits, options).draw(self.shape, self.device)

    def walk(self, digits: Sequence[Digit], options: DigitOptions) -> Iterator[Step]:
        """The reverse process of the digits, all in one batch, step by step; the last step's xt holds the images."""
        labels = torch.tensor([joint_label(self.domains, d.domain, d.label) for d in digits], device=self.device)
        denoise = Denoiser(
            self.predict,
            self.schedule,
            self.about["prediction"],
            condition={"labels": labels},
            null_condition={"labels": torch.full_like(labels, self.model.null_label)},
            guidance_scale=options.guidance_scale,
            guidance_interval=options.guidance_interval,
            use_clipped_model_output=True,
        )
        sources = self.sources(digits, options)
        xt, timesteps = sources.draw(self.shape, self.device), self.schedule.timesteps(options.steps)
        yield from reverse_process(denoise, self.schedule, xt, timesteps, options.sampler, options.eta, sources)

    def images(self, digits: Sequence[Digit], options: DigitOptions) -> Iterator[tuple[Digit, Tensor]]:
        """Draw digits in batches; yields each with its image, uint8 (3, H, W) on the CPU, in their order.

        A `UserError` at once, if the steps do not suit the weights' schedule; later as `draw_in_batches`.
        """
        self.schedule.timesteps(options.steps)

        def finish(batch: Sequence[Digit], xt: Tensor) -> Tensor:
            check_finite(xt, [digit.file for digit in batch], self.precision)
            return to_uint8(xt)

        return draw_in_batches(
            digits, lambda batch: self.walk(batch, options), finish, batch_size=options.batch_size, steps=options.steps
        )


def load_digit_sampler(weights: Path, options: DigitOptions) -> DigitSampler:
    """The sampler of weights that must draw the course's digits, and no other images."""
    sampler = DigitSampler(weights, options.device, options.precision)
    if sampler.domains != DOMAINS:
        raise UserError(f"{weights}: draws {', '.join(sampler.domains)}, not the digits; name other --weights")
    return sampler


def add_sampling_arguments(parser: Parser, leave_out: Sequence[str] = ()) -> None:
    """Add the flags of everything that draws digits: `--weights`, and a flag for each of `DigitOptions`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--weights", type=Path, default=WEIGHTS, help="weights: a finished model or a training state")
    add_options(group, DigitOptions, leave_out)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that gets mnistm/ and svhn/")
    group = parser.add_argument_group("digits")
    group.add_argument("--layout", choices=LAYOUTS, default="2025", help="edition of the course that OUT is filled for")
    group.add_argument("--classes", type=int, nargs="+", help="draw only these digits")
    group.add_argument("--count", type=int, default=50, help="images of each digit and domain")
    group.add_argument("--overwrite", action="store_true", help="remove other files from OUT's two folders")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files that this process wrote."""
    options = options_from(args, DigitOptions)
    sampler = DigitSampler(args.weights, options.device, options.precision)
    digits = wanted_digits(sampler.domains, args.layout, args.classes, args.count)
    processes = Processes()
    mine = digits[processes.rank :: processes.count]
    drawn = sampler.images(mine, options)  # nothing is drawn yet, but bad options are refused
    if processes.rank == 0:
        clear_way(args.out, [digit.file for digit in digits], args.overwrite)
    processes.wait()
    with stage_folder(args.out, [digit.file for digit in mine]) as stage:
        for digit, image in drawn:
            to_pil(image).save(stage / digit.file)
    processes.wait()
    if processes.rank == 0:
        by = f", drawn by {processes.count} processes" if processes.count > 1 else ""
        say(f"{len(digits)} images in {args.out}{by}")
    return [args.out / digit.file for digit in mine]


if __name__ == "__main__":
    run(main, parse_arguments())

"""Ablations of problem 1: guidance, its interval, samplers and steps, and how a class is told to the network."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ablation_tables import PERCENT, Ablation, Rows, Settings
from benchmarks.ablation_training import LEARNING, RUNS, run_folder
from common.checkpoint import save_tensors
from common.cli import UserError, say
from common.runtime import pick_device, pick_precision, seeded_generator
from common.schedule import NoiseSchedule
from common.training import Batch, Trainer, diffusion_loss, loss_of
from common.training_options import TrainingOptions
from p1_ddpm.digits import DOMAINS, read_digits
from p1_ddpm.evaluate import DATA, draw_sets, read_real, score
from p1_ddpm.judge import WEIGHTS as JUDGES
from p1_ddpm.judge import load_judge
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from p1_ddpm.sample import WEIGHTS, DigitSampler
from p1_ddpm.train import DigitBatches

AT_ONCE = 100  # digits
EVERYWHERE = (0, 1000)
INTERVALS = (EVERYWHERE, (0, 900), (0, 750), (0, 500), (250, 750), (500, 1000))
SAMPLERS = ("dpm-solver++", "ddim", "ddpm")
SAMPLING = {"sampler": "dpm-solver++", "steps": 10, "eta": 0.0, "guidance_interval": EVERYWHERE}
COLUMNS = {
    "right, MNIST-M": ("mnistm_accuracy", PERCENT),
    "right, SVHN": ("svhn_accuracy", PERCENT),
    "recall, MNIST-M": ("mnistm_recall", "{:.3f}"),
    "recall, SVHN": ("svhn_recall", "{:.3f}"),
    "Frechet, MNIST-M": ("mnistm_frechet", "{:.2f}"),
    "Frechet, SVHN": ("svhn_frechet", "{:.2f}"),
}
DRAWN = {
    "count": (20, "images of each digit and domain"),
    "seed": (21, "of the noise"),
    "data": (DATA, "the course's digits, to compare with; without them only accuracy is measured"),
    "judges": (JUDGES, "folder of the judges"),
}
SHIPPED = {"weights": (WEIGHTS, "that draw")} | DRAWN
FACTS = "{count} images of each digit and domain, seed {seed}, "
TEN_STEPS = "10 steps of DPM-Solver++"


class Eye:
    """Draws digits and judges them, the same way for all variants of an ablation.

    Args:
        settings: with `DRAWN`.

    Raises:
        UserError: judges or data are missing or broken, or there is nothing to draw.
    """

    def __init__(self, settings: Settings):
        self.count, self.seed = settings["count"], settings["seed"]
        if self.count < 1:
            raise UserError(f"--count {self.count}: starts at 1")
        self.judges = {domain: load_judge(settings["judges"], domain) for domain in DOMAINS}
        # Only a folder that somebody named must be there.
        self.real = read_real(None if settings["data"] == DATA else settings["data"])

    def row(self, variant: str, sampler: DigitSampler, /, **options: Any) -> dict[str, Any]:
        """The figures of one way to draw."""
        say(f"{variant} ...")
        sets = draw_sets(sampler, "2024", self.count, self.seed, SAMPLING | options, AT_ONCE)
        self.result = score(sets, self.judges, None, self.real)
        return flat(variant, self.result)

    def yardstick(self) -> Rows:
        """What real images get in the place of drawn ones: training images, and for accuracy held-out ones."""
        figures = {
            domain: {"accuracy": part["judge_held_out_accuracy"]} | part.get("yardstick", {})
            for domain, part in self.result.items()
            if domain in DOMAINS
        }
        return [flat("real images", figures)]


def flat(variant: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A row with what `score` tells of both domains."""
    names = ("accuracy", "frechet", "precision", "recall")
    return {"variant": variant} | {
        f"{domain}_{name}": figures[domain][name] for domain in DOMAINS for name in names if name in figures[domain]
    }


def sampler_of(weights: Path) -> DigitSampler:
    """A sampler that computes as `hw2_1.sh` does.

    Raises:
        UserError: the weights are missing or broken, or draw other things than digits.
    """
    device = pick_device()
    sampler = DigitSampler(weights, device, pick_precision("auto", device))
    if sampler.domains != DOMAINS:
        raise UserError(f"{weights}: draws {', '.join(sampler.domains)}, not digits; name another file")
    return sampler


def measure_guidance(settings: Settings) -> Rows:
    """Accuracy and variety by guidance scale."""
    eye, sampler = Eye(settings), sampler_of(settings["weights"])
    rows = [eye.row(f"{scale:g}", sampler, guidance_scale=scale) for scale in settings["scales"]]
    return rows + eye.yardstick()


def measure_interval(settings: Settings) -> Rows:
    """The same where guidance is on for a part of the timesteps only."""
    eye, sampler, scale = Eye(settings), sampler_of(settings["weights"]), settings["scale"]
    rows = [
        eye.row("{} to {}".format(*interval), sampler, guidance_scale=scale, guidance_interval=interval)
        for interval in INTERVALS
    ]
    return [*rows, eye.row("nowhere", sampler, guidance_scale=1.0), *eye.yardstick()]


def measure_steps(settings: Settings) -> Rows:
    """The same by sampler and number of steps."""
    eye, sampler, scale = Eye(settings), sampler_of(settings["weights"]), settings["scale"]
    rows = [
        eye.row(f"{method}, {steps}", sampler, sampler=method, steps=steps, guidance_scale=scale)
        for method in SAMPLERS
        for steps in settings["steps"]
    ]
    return rows + eye.yardstick()


class SeparateContext(nn.Module):
    """The row of a class as the sum of its domain's and its digit's; the null label has its own of each.

    Args:
        width: of the rows.
    """

    def __init__(self, width: int):
        super().__init__()
        domains, digits = len(DOMAINS), max(DOMAINS.values())
        self.domain, self.digit = nn.Embedding(domains + 1, width), nn.Embedding(digits + 1, width)
        pairs = [(k, digit) for k, count in enumerate(DOMAINS.values()) for digit in range(count)]
        self.register_buffer("pairs", torch.tensor([*pairs, (domains, digits)]), persistent=False)
        # So that the sum starts as wide as a row of the joint table.
        for table in (self.domain, self.digit):
            nn.init.normal_(table.weight, std=0.5**0.5)

    def forward(self, labels: Tensor) -> Tensor:
        domain, digit = self.pairs[labels].unbind(-1)
        return self.domain(domain) + self.digit(digit)


class SeparateUNet(ContextUNet):
    """A Context-UNet whose classes are told as domain plus digit."""

    def __init__(self, config: ContextUNetConfig):
        super().__init__(config)
        self.context = SeparateContext(config.embedding)


def joint_state(model: ContextUNet) -> dict[str, Tensor]:
    """The weights as those of a plain Context-UNet: sums of two rows are a joint table too, if a special one."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("context.")}
    labels = torch.arange(model.null_label + 1, device=next(model.parameters()).device)
    return state | {"context.weight": model.context(labels).detach()}


CLASSES = {"joint: 20 rows": ContextUNet, "separate: 2 + 10 rows": SeparateUNet}


def train_digits(settings: Settings, variant: str, sets: dict[str, tuple]) -> tuple[Path, float]:
    """Train a small network; returns the path of its weights and its loss on held-out images."""
    names = ("training_steps", "batch_size", "widths", "lr", "training_seed", "data")
    folder = run_folder(settings["out"], variant, {name: settings[name] for name in names})
    schedule, prediction = NoiseSchedule("cosine"), "v"
    options = TrainingOptions(
        steps=settings["training_steps"], batch_size=settings["batch_size"], lr=settings["lr"],
        seed=settings["training_seed"], **LEARNING,
    )  # fmt: skip
    train, held_out = ({domain: parts[k] for domain, parts in sets.items()} for k in (0, 1))
    batches = DigitBatches(train, DOMAINS, schedule, options.batch_size, 0.15, ("svhn",), options.seed)
    validation = DigitBatches(held_out, DOMAINS, schedule, 256, 0.0, (), 0)(0, seeded_generator(0, 3))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return diffusion_loss(model, batch, schedule, prediction, gamma=5.0)

    classes, widths = sum(DOMAINS.values()), settings["widths"]
    try:
        config = ContextUNetConfig(classes, widths=widths, blocks=[1] * len(widths), attention=[False] * len(widths))
    except ValueError as error:
        raise UserError(f"--widths: {error}") from None
    torch.manual_seed(options.seed)
    model = CLASSES[variant](config)
    about = {
        "kind": "ContextUNet", "config": asdict(config), "schedule": asdict(schedule), "prediction": prediction,
        "domains": DOMAINS, "image_size": 28,
    }  # fmt: skip
    trainer = Trainer(model, options, folder, about, batches, loss_fn, loss_of(validation, loss_fn))
    averaged = trainer.run()
    state = joint_state(averaged) if isinstance(averaged, SeparateUNet) else averaged.state_dict()
    save_tensors(folder / "model.safetensors", state, about)
    trainer.accelerator.end_training()
    return folder / "model.safetensors", trainer.validation_loss()


def measure_classes(settings: Settings) -> Rows:
    """Two equal trainings of a small network, told joint classes, and told domain and digit."""
    eye = Eye(settings)
    sets = {domain: images.split() for domain, images in read_digits(settings["data"], 28).items()}
    if missing := set(DOMAINS) - set(sets):
        raise UserError(f"{settings['data']}: has no {min(missing)}, which this compares with the other; add it")
    rows = []
    for variant in CLASSES:
        path, loss = train_digits(settings, variant, sets)
        sampler = sampler_of(path)
        rows.append(eye.row(variant, sampler, guidance_scale=settings["scale"]) | {"loss": loss})
    return rows + eye.yardstick()


def ablations() -> Iterable[tuple[str, Ablation]]:
    """The ablations of this problem by their names."""
    page, weights = "p1.md", ("weights",)
    scale = {"scale": (6.0, "guidance scale")}
    yield "p1-guidance", Ablation(
        page, "guidance scale against accuracy and variety",
        SHIPPED | {"scales": ([1.0, 2.0, 4.0, 6.0, 8.0, 12.0], "guidance scales")},
        measure_guidance, COLUMNS, FACTS + TEN_STEPS, "`guidance_scale`", weights,
    )  # fmt: skip
    yield "p1-interval", Ablation(
        page, "guidance at some timesteps only", SHIPPED | scale, measure_interval, COLUMNS,
        FACTS + "guidance {scale}, " + TEN_STEPS, "`guidance_interval`", weights,
    )  # fmt: skip
    yield "p1-steps", Ablation(
        page, "samplers and their number of steps", SHIPPED | scale | {"steps": ([5, 10, 20, 50], "numbers of steps")},
        measure_steps, COLUMNS, FACTS + "guidance {scale}", "sampler, steps", weights,
    )  # fmt: skip
    yield "p1-classes", Ablation(
        page, "joint classes against separate embeddings of domain and digit",
        DRAWN | {
            "scale": (2.0, "guidance scale"), "training_steps": (2400, "of each training"),
            "batch_size": (64, "images a step"), "widths": ([64, 128], "channels by level"), "lr": (1e-3, "peak rate"),
            "training_seed": (0, "of weights, order and noise"), **RUNS,
        },
        measure_classes, {"validation loss": ("loss", "{:.4f}")} | COLUMNS,
        "Two trainings of {training_steps} steps of {batch_size} images, widths {widths}, rate {lr}, seed"
        " {training_seed}; then " + FACTS + "guidance {scale}, " + TEN_STEPS, "classes",
    )  # fmt: skip


P1 = dict(ablations())

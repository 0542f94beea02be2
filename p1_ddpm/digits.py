"""The digits: two domains of ten, their joint classes, the course's two layouts, and their images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cli import UserError, check
from common.data import LabelledImages, read_csv_images

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "hw2_data" / "digits"
DOMAINS = {"mnistm": 10, "svhn": 10}
# Which digits each domain's folder holds in a year's edition of the course.
LAYOUTS = {
    "2025": {"mnistm": (0, 2, 4, 6, 8), "svhn": (1, 3, 5, 7, 9)},
    "2024": {"mnistm": tuple(range(10)), "svhn": tuple(range(10))},
}


@dataclass(frozen=True)
class Digit:
    """One image to draw: image `number`, counted from 1, of a class."""

    domain: str
    label: int
    number: int

    @property
    def file(self) -> str:
        """Its path below OUT."""
        return f"{self.domain}/{self.label}_{self.number:03d}.png"


def joint_label(domains: Mapping[str, int], domain: str, label: int) -> int:
    """The class id of (domain, label), where `domains` says, in order, how many labels each domain has.

    A `UserError` if there is no such domain, or it lacks the label.
    """
    if domain not in domains:
        raise UserError(f"domain {domain}: these weights know {', '.join(domains)}; choose one of them")
    if not 0 <= label < domains[domain]:
        raise UserError(f"class {label}: {domain} has 0 to {domains[domain] - 1}; choose one of them")
    names = list(domains)
    return sum(domains[name] for name in names[: names.index(domain)]) + label


def wanted_digits(domains: Mapping[str, int], layout: str, classes: Sequence[int] | None, count: int) -> list[Digit]:
    """The images of a layout in the order of their names, `count` of each class (of all classes if `classes` is None).

    Weights trained on other images than the course's have no layouts: all their classes are drawn. A `UserError` for a
    class that the layout's folders do not hold, or nothing to draw.
    """
    check("count", count, count > 0, "above 0")
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


def read_digits(root: Path, size: int = 28) -> dict[str, LabelledImages]:
    """The course's data, `root/{mnistm,svhn}/train.csv` with `data/*.png`, resized to `size` pixels, by domain.

    One domain may be absent; a `UserError` if both are, or a file is bad.
    """
    found = [domain for domain in DOMAINS if (root / domain / "train.csv").exists()]
    if not found:
        raise UserError(
            f"{root}: holds neither mnistm/train.csv nor svhn/train.csv; set --data to the course's digits folder"
        )
    return {domain: read_csv_images(root / domain / "train.csv", size, DOMAINS[domain]) for domain in found}


def read_real(data: Path | None, size: int = 28) -> dict[str, tuple[LabelledImages, LabelledImages]]:
    """Training and held-out images by domain, to compare drawn ones with; nothing if `data` is None and `DATA` absent.

    The split is that of training, before any layout is chosen, so no shipped model has seen the held-out images.
    """
    if data is None and not DATA.is_dir():
        print(f"{DATA} is not there, so nothing is compared with real images; name another folder with --data")
        return {}
    return {domain: images.split() for domain, images in read_digits(data or DATA, size).items()}


def keep_layout(images: LabelledImages, domain: str, layout: str) -> LabelledImages:
    """The images whose digits that layout's folder of the domain holds."""
    return images.take(torch.isin(images.labels, torch.tensor(LAYOUTS[layout][domain])))

"""The digits: two domains of ten, their joint classes, and the course's two layouts."""

from collections.abc import Mapping
from pathlib import Path

import torch

from common.cli import UserError
from common.data import LabelledImages, read_csv_images

DOMAINS = {"mnistm": 10, "svhn": 10}
# Which digits each domain's folder holds in a year's edition of the course.
LAYOUTS = {
    "2025": {"mnistm": (0, 2, 4, 6, 8), "svhn": (1, 3, 5, 7, 9)},
    "2024": {"mnistm": tuple(range(10)), "svhn": tuple(range(10))},
}


def joint_label(domains: Mapping[str, int], domain: str, label: int) -> int:
    """The class id of (domain, label): domains follow one another, each with its own number of labels.

    Raises:
        UserError: no such domain, or a label it does not have.
    """
    if domain not in domains:
        raise UserError(f"domain {domain}: these weights know {', '.join(domains)}; choose one of them")
    if not 0 <= label < domains[domain]:
        raise UserError(f"class {label}: {domain} has 0 to {domains[domain] - 1}; choose one of them")
    names = list(domains)
    return sum(domains[name] for name in names[: names.index(domain)]) + label


def read_digits(root: Path, size: int = 28) -> dict[str, LabelledImages]:
    """The course's data: `root/{mnistm,svhn}/train.csv` with `data/*.png`; one domain may be absent.

    Args:
        root: the `digits` folder.
        size: side of the images, pixels.

    Raises:
        UserError: neither domain is there, or a file is bad.
    """
    root = Path(root)
    found = [domain for domain in DOMAINS if (root / domain / "train.csv").exists()]
    if not found:
        raise UserError(
            f"{root}: holds neither mnistm/train.csv nor svhn/train.csv; set --data to the course's digits folder"
        )
    return {domain: read_csv_images(root / domain / "train.csv", size, DOMAINS[domain]) for domain in found}


def of_layout(images: LabelledImages, domain: str, layout: str) -> LabelledImages:
    """The images whose digits that layout's folder of the domain holds."""
    return images.take(torch.isin(images.labels, torch.tensor(LAYOUTS[layout][domain])))

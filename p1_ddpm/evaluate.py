"""Judge drawn digits: accuracy as the course's grader counts it, and how near they lie to real images.

python evaluate.py OUT                              # a folder filled by hw2_1.sh
python evaluate.py OUT --classifier Classifier.pth  # with the course's classifier too
python evaluate.py --seeds 1 2 3 --layout 2024      # draw these seeds and judge them, without writing images
"""

import hashlib
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np
import pandas as pd
import torch

from common.cli import Parser, UserError, format_default, options_from, run
from common.data import LabelledImages
from common.images import read_image
from common.metrics import all_distances
from common.output import add_json_argument, check_json, write_json
from common.runtime import seeded_generator
from p1_ddpm.digits import DOMAINS, LAYOUTS, read_real, wanted_digits
from p1_ddpm.judge import IMAGE_SIZE, WEIGHTS, Judge, LeNet, apply_in_batches, find_correct, load_classifier, load_judge
from p1_ddpm.sample import DigitOptions, DigitSampler, add_sampling_arguments, load_digit_sampler

NEIGHBOURS = 3  # k of precision and recall
Sets = Mapping[str, LabelledImages]  # by domain
Figures = dict[str, Any]


def read_graded(out: Path, layout: str) -> Sets:
    """What a grader reads from OUT: every file of both folders, its label the first character of its name.

    A `UserError` if a folder is missing or empty, or holds a file that a grader would stumble over or misread.
    """
    sets = {}
    for domain, digits in LAYOUTS[layout].items():
        folder = out / domain
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if not files:
            problem = "holds no images" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {problem}; fill it with: bash hw2_1.sh {out}")
        for file in files:
            first = file.name[0]
            if first not in "0123456789":
                raise UserError(f"{file}: a grader reads each file's digit from its first character; move it away")
            if int(first) not in digits:
                raise UserError(f"{file}: layout {layout} has no {first} in {domain}; set --layout or move it away")
        images = torch.from_numpy(np.stack([read_image(file, IMAGE_SIZE) for file in files])).permute(0, 3, 1, 2)
        labels = torch.tensor([int(file.name[0]) for file in files])
        sets[domain] = LabelledImages(images.contiguous(), labels, [file.name for file in files])
    return sets


def draw_sets(sampler: DigitSampler, layout: str, count: int, options: DigitOptions) -> Sets:
    """The images that sample.py would write with the same options, in memory."""
    digits = wanted_digits(sampler.domains, layout, None, count)
    images = torch.stack([image for _, image in sampler.images(digits, options)])
    drawn = LabelledImages(images, torch.tensor([d.label for d in digits]), [d.file for d in digits])
    return {domain: drawn.take(torch.tensor([d.domain == domain for d in digits])) for domain in DOMAINS}


def match_counts(sets: Sequence[LabelledImages]) -> list[LabelledImages]:
    """A random part of each set, with the same number of images of every digit: as many as the scarcest set has."""
    counts = torch.stack([images.labels.bincount(minlength=10) for images in sets]).min(dim=0).values.tolist()
    parts = []
    for images in sets:
        order = torch.randperm(len(images), generator=seeded_generator(0, 4))
        parts.append(images.take(torch.cat([order[images.labels[order] == i][:n] for i, n in enumerate(counts)])))
    return parts


def compare(judge: Judge, *sets: LabelledImages) -> tuple[Figures, Figures]:
    """Distances of drawn images, and as a yardstick of training images, from held-out images; `sets` are these three.

    They are measured on the judge's features, with equal counts of every digit in all three sets. Such sets differ less
    than sets drawn at random, so the kernel distance of like sets comes out slightly below zero. Both results are empty
    if the sets have too few digits in common.
    """
    parts = match_counts(sets)
    if len(parts[0]) <= NEIGHBOURS:
        return {}, {}
    drawn, train, held = (apply_in_batches(judge.features, part.images) for part in parts)
    of_drawn, of_train = (all_distances(held, features, NEIGHBOURS) for features in (drawn, train))
    return of_drawn | {"compared": len(held)}, of_train | {"images": len(held)}


def measure(
    sets: Sets, judges: Mapping[str, Judge], real: Mapping[str, tuple], classifier: LeNet | None = None
) -> tuple[Figures, Figures]:
    """Measure one set of digits, beside real (training and held-out) ones in the domains where there are some.

    Returns the figures of each domain and `score`, the course's mean of both accuracies; and the yardsticks of each
    domain, which are what held-out and training images get in the place of drawn ones.
    """
    figures, yardsticks = {}, {}
    for domain, images in sets.items():
        judge = judges[domain]
        right = find_correct(judge, images)
        by_digit = {str(n): right[images.labels == n].mean().item() for n in images.labels.unique().tolist()}
        found = {"images": len(images), "accuracy": right.mean().item(), "accuracy_by_digit": by_digit}
        held_out = {"images": judge.about["held_out"], "accuracy": judge.about["held_out_accuracy"]}
        figures[domain], yardsticks[domain] = found, {"held_out_images": held_out}
        if domain in real:
            distances, training = compare(judge, images, *real[domain])
            found |= distances
            yardsticks[domain] |= {"training_images": training} if training else {}
        if classifier and domain == "mnistm":
            found["classifier_accuracy"] = find_correct(classifier, images).mean().item()
            if domain in real:
                held_out["classifier_accuracy"] = find_correct(classifier, real[domain][1]).mean().item()
    return {"score": statistics.fmean(found["accuracy"] for found in figures.values())} | figures, yardsticks


def summarize(values: Sequence[Any]) -> Figures:
    """The mean and its standard error over sets of digits, of every figure in them."""
    if isinstance(values[0], Mapping):
        return {name: summarize([value[name] for value in values]) for name in values[0] if name != "source"}
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def percent(part: float) -> str:
    return f"{100 * part:.2f} %"


def report(results: Figures) -> None:
    """Print a table a domain, with a row a set of digits and the yardsticks beneath, and the course's mean."""
    rows, mean = results["sets"], results["mean"]
    columns = dict.fromkeys(("accuracy", "classifier_accuracy"), percent)
    columns |= dict.fromkeys(("frechet", "kernel", "precision", "recall"), "{:.3f}".format)
    for domain in DOMAINS:
        table = pd.DataFrame([row[domain] for row in rows], index=[row["source"] for row in rows])
        table = table[[name for name in columns if name in table]]
        if len(rows) > 1:
            table = pd.concat([table, table.agg(["mean", "sem"]).rename({"sem": "standard error"})])
        for name, figures in results["yardsticks"][domain].items():
            table.loc[f"{figures['images']} {name.replace('_', ' ')}"] = pd.Series(figures)
        print(f"\n{domain}, {rows[0][domain]['images']} images a row")
        print(table.to_string(formatters=columns, na_rep="", line_width=120))
        digits = mean[domain]["accuracy_by_digit"].items()
        print("by digit: " + ", ".join(f"{digit} {percent(part['mean'])}" for digit, part in digits))
    print(f"\nmean of the two accuracies: {percent(mean['score']['mean'])}")
    if "classifier_accuracy" in mean["mnistm"]:
        both = (mean["mnistm"]["classifier_accuracy"]["mean"] + mean["svhn"]["accuracy"]["mean"]) / 2
        print(f"with the course's classifier for mnistm: {percent(both)}")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="folder to judge; without it digits are drawn")
    digits = parser.add_argument_group("digits")
    digits.add_argument("--seeds", type=int, nargs="+", help="draw these seeds, a row each")
    digits.add_argument("--layout", choices=LAYOUTS, default="2025", help="edition of the course")
    digits.add_argument("--count", type=int, default=50, help="images of each digit and domain to draw")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--data", type=Path, help="the course's digits folder, if not hw2_data/digits")
    judging.add_argument("--classifier", type=Path, help="the course's Classifier.pth, for mnistm")
    judging.add_argument("--judges", type=Path, default=WEIGHTS, help="folder of the judges' weights")
    add_json_argument(parser)
    add_sampling_arguments(parser, leave_out=("seed",))
    return parser.parse_args(argv)


def main(args) -> Figures:
    """Judge and print; returns the settings, the figures of each set, their means, and the yardsticks."""
    if args.out and args.seeds:
        raise UserError(f"--seeds: {args.out} is already drawn; leave out one of the two")
    options = options_from(args, DigitOptions)
    check_json(args.json)
    judges = {domain: load_judge(args.judges, domain) for domain in DOMAINS}
    classifier = load_classifier(args.classifier) if args.classifier else None
    settings = {"layout": args.layout}
    if args.out:
        settings["folder"] = str(args.out)
        drawn = [(str(args.out), read_graded(args.out, args.layout))]
    else:
        sampler = load_digit_sampler(args.weights, options)
        seeds = args.seeds or [options.seed]
        seeded = [replace(options, seed=seed) for seed in seeds]
        drawn = ((f"seed {one.seed}", draw_sets(sampler, args.layout, args.count, one)) for one in seeded)
        settings |= asdict(options) | {"precision": sampler.precision, "device": str(sampler.device)}
        settings |= {"seeds": seeds, "count": args.count, "weights": format_default(args.weights)}
        settings["weights_sha256"] = hashlib.sha256(args.weights.read_bytes()).hexdigest()
        del settings["seed"]
    real = read_real(args.data)
    rows = []
    for source, sets in drawn:
        figures, yardsticks = measure(sets, judges, real, classifier)
        rows.append({"source": source} | figures)
    results = {"settings": settings, "sets": rows, "mean": summarize(rows), "yardsticks": yardsticks}
    report(results)
    write_json(args.json, results)
    return results


if __name__ == "__main__":
    run(main, parse_arguments())

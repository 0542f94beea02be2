"""Judge drawn digits: accuracy as the course's grader counts it, and how near they lie to real images.

python evaluate.py OUT                              # a folder filled by hw2_1.sh
python evaluate.py OUT --classifier Classifier.pth  # with the course's classifier too
python evaluate.py --seeds 1 2 3 --layout 2024      # drawn here and judged, nothing written
python evaluate.py --train-judge                    # train the judges anew (minutes)
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
import torch.nn.functional as F

from common.checkpoint import load_tensors, save_tensors
from common.cli import Parser, UserError, add_json_argument, check_json, progress, run
from common.data import LabelledImages, read_image
from common.images import check_output_folder, save_png
from common.metrics import all_distances
from common.runtime import seeded_generator
from p1_ddpm.digits import DOMAINS, LAYOUTS, read_digits
from p1_ddpm.judge import (
    EPOCHS,
    IMAGE_SIZE,
    WEIGHTS,
    LeNet,
    LoadedJudge,
    correct,
    in_batches,
    load_classifier,
    load_judge,
    train_judge,
)
from p1_ddpm.nearest import nearest_training
from p1_ddpm.sample import DigitSampler, add_sampling_arguments, make_sampler, sampling_options, wanted_digits

DATA = Path(__file__).resolve().parent.parent / "hw2_data" / "digits"
NEIGHBOURS = 3  # k of precision and recall
NEAREST_SAMPLE = 100  # drawn images of a domain whose nearest training images are looked for
Sets = dict[str, LabelledImages]


def read_graded(out: Path, layout: str) -> Sets:
    """What a grader reads from OUT: every file of both folders, its label the first character of its name.

    Raises:
        UserError: a folder is missing or empty, or holds a file that a grader would stumble over or misread.
    """
    sets = {}
    for domain, digits in LAYOUTS[layout].items():
        folder = Path(out) / domain
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; fill it with: bash hw2_1.sh {out}")
        files = sorted(folder.iterdir())
        if not files:
            raise UserError(f"{folder}: holds no images; fill it with: bash hw2_1.sh {out}")
        for file in files:
            if not (file.name[0].isascii() and file.name[0].isdecimal()):
                raise UserError(f"{file}: a grader reads each file's digit from its first character; move it away")
            if int(file.name[0]) not in digits:
                raise UserError(
                    f"{file}: layout {layout} has no {file.name[0]} in {domain}; set --layout or move it away"
                )
        images = torch.stack([torch.from_numpy(read_image(file, IMAGE_SIZE).copy()) for file in files])
        labels = torch.tensor([int(file.name[0]) for file in files])
        sets[domain] = LabelledImages(images.permute(0, 3, 1, 2).contiguous(), labels, [file.name for file in files])
    return sets


def draw_sets(sampler: DigitSampler, layout: str, count: int, seed: int, options: dict[str, Any], batch: int) -> Sets:
    """The images that sample.py would write, in memory."""
    digits = wanted_digits(sampler.domains, layout, None, count)
    starts = progress(range(0, len(digits), batch), f"digits of seed {seed}", "part")
    drawn = torch.cat([sampler.images(digits[i : i + batch], seed, options) for i in starts])
    everything = LabelledImages(drawn, torch.tensor([d.label for d in digits]), [d.file for d in digits])
    return {name: everything.take(torch.tensor([d.domain == name for d in digits])) for name in DOMAINS}


def read_real(data: Path | None) -> dict[str, tuple[LabelledImages, LabelledImages]]:
    """Training and held-out images by domain; nothing if no folder is named and the usual one is not there.

    Raises:
        UserError: the named folder does not hold the course's digits.
    """
    if data is None and not DATA.is_dir():
        print(f"{DATA} is not there, so nothing is compared with real images; name another folder with --data")
        return {}
    # The split comes first: all layouts then share one held-out part, the one that no shipped model was trained on.
    return {domain: images.split() for domain, images in read_digits(data or DATA, size=IMAGE_SIZE).items()}


def matched(sets: Sequence[LabelledImages]) -> list[LabelledImages]:
    """A random part of each set, with the same number of images of every digit: as many as the scarcest set has."""
    counts = torch.stack([images.labels.bincount(minlength=10) for images in sets]).min(dim=0).values.tolist()
    parts = []
    for images in sets:
        order = torch.randperm(len(images), generator=seeded_generator(0, 4))
        parts.append(images.take(torch.cat([order[images.labels[order] == i][:n] for i, n in enumerate(counts)])))
    return parts


def compare(judge: LoadedJudge, drawn: LabelledImages, train: LabelledImages, held: LabelledImages) -> dict[str, Any]:
    """Distances of drawn from held-out images on the judge's features, and of training images as the yardstick.

    All three sets have equal counts of every digit, which brings the kernel distance of like sets slightly below zero:
    they differ less than sets drawn at random. Empty if they have too few digits in common.
    """
    parts = matched([drawn, train, held])
    if len(parts[0]) <= NEIGHBOURS:
        return {}
    drawn, train, held = (in_batches(judge.model.features, part.images) for part in parts)
    yardstick = all_distances(held, train, NEIGHBOURS)
    return all_distances(held, drawn, NEIGHBOURS) | {"compared": len(held), "yardstick": yardstick}


def score(
    sets: Sets, judges: Mapping[str, LoadedJudge], classifier: LeNet | None, real: Mapping[str, tuple]
) -> dict[str, Any]:
    """All figures of one set of digits: `score`, the mean of the domains' accuracies, and a part for each domain."""
    result = {}
    for domain, images in sets.items():
        judge = judges[domain]
        right = correct(judge.model, images)
        figures = {
            "images": len(images),
            "accuracy": right.double().mean().item(),
            "digits": {int(d): right[images.labels == d].double().mean().item() for d in images.labels.unique()},
            "judge_held_out_accuracy": judge.about["held_out_accuracy"],
        }
        if classifier and domain == "mnistm":
            figures["classifier_accuracy"] = correct(classifier, images).double().mean().item()
            if domain in real:
                figures["classifier_held_out_accuracy"] = correct(classifier, real[domain][1]).double().mean().item()
        if domain in real:
            figures |= compare(judge, images, *real[domain])
        result[domain] = figures
    return {"score": sum(result[domain]["accuracy"] for domain in result) / len(result)} | result


def percent(part: float) -> str:
    return f"{100 * part:.2f} %"


def report(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a table a domain, with a row a set of digits and the yardstick beneath, and the course's mean."""
    for domain in DOMAINS:
        rows = [result[domain] for result in results]
        print(
            f"\n{domain}: {rows[0]['images']} images a row; the judge gets"
            f" {percent(rows[0]['judge_held_out_accuracy'])} of real held-out images right"
        )
        table = pd.DataFrame(
            [{key: value for key, value in row.items() if isinstance(value, float)} for row in rows],
            index=[result["source"] for result in results],
        ).drop(columns=["judge_held_out_accuracy", "classifier_held_out_accuracy"], errors="ignore")
        if len(table) > 1:
            table.loc["mean"] = table.mean()
        if "yardstick" in rows[0]:
            table.loc["training images"] = pd.Series(rows[0]["yardstick"])
        formats = dict.fromkeys(("frechet", "kernel", "precision", "recall"), "{:.3f}".format)
        formats |= dict.fromkeys(("accuracy", "classifier_accuracy"), percent)
        print(table.to_string(formatters=formats, na_rep="", line_width=120))
        if "compared" in rows[0]:
            print(f"distances: {rows[0]['compared']} images against as many held-out ones of the same digits")
        digits = pd.DataFrame([row["digits"] for row in rows]).mean()
        print("by digit: " + ", ".join(f"{digit} {percent(part)}" for digit, part in digits.items()))
        if "classifier_held_out_accuracy" in rows[0]:
            held = percent(rows[0]["classifier_held_out_accuracy"])
            print(f"the course's classifier gets {held} of real held-out images right")
    print(f"\nmean of the two accuracies: {percent(sum(result['score'] for result in results) / len(results))}")
    if "classifier_accuracy" in results[0]["mnistm"]:
        means = [(result["mnistm"]["classifier_accuracy"] + result["svhn"]["accuracy"]) / 2 for result in results]
        print(f"with the course's classifier for mnistm: {percent(sum(means) / len(means))}")


def record(weights: Path, layout: str, seeds: Sequence[int], options: Mapping[str, Any], results: Sequence) -> None:
    """Keep the mean figures of these seeds, and how they were drawn, among the facts in the weights file."""
    tensors, about = load_tensors(weights)
    names = ("accuracy", "frechet", "precision", "recall")
    means = {
        domain: {n: sum(r[domain][n] for r in results) / len(results) for n in names if n in results[0][domain]}
        for domain in DOMAINS
    }
    figures = means | {"score": sum(r["score"] for r in results) / len(results), "seeds": list(seeds)} | dict(options)
    about["figures"] = about.get("figures", {}) | {layout: figures}
    save_tensors(weights, tensors, about)


def show_nearest(path: Path, sets: Sets, judges: Mapping[str, LoadedJudge], real: Mapping[str, tuple]) -> None:
    """Write a figure of drawn images above their nearest training images, and print how near they lie."""
    pictures = []
    for domain in [domain for domain in sets if domain in real]:
        train, held = real[domain]
        parts = matched([sets[domain], held])
        if not len(parts[0]):
            continue
        sample = torch.linspace(0, len(parts[0]) - 1, min(NEAREST_SAMPLE, len(parts[0]))).long()
        title = f"{domain}: drawn digits, the distance to the nearest training image (levels of 255), and that image"
        drawn, held = (part.take(sample) for part in parts)
        picture, distances = nearest_training(drawn, held, train, judges[domain].model, title)
        pictures.append(picture)
        print(
            f"\n{domain}: nearest of {len(train)} training images, for {len(sample)} drawn and as many held-out images"
        )
        print(pd.DataFrame(distances.values(), index=list(distances)).to_string(float_format="{:.2f}".format))
    if not pictures:
        raise UserError("--nearest: the real images show none of the drawn digits; name another folder with --data")
    widest = max(picture.shape[2] for picture in pictures)
    padded = [F.pad(picture, (0, widest - picture.shape[2], 0, 8), value=255) for picture in pictures]
    save_png(path, torch.cat(padded, dim=1))
    print(f"\nfigure: {path}")


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
    add_json_argument(parser, "append all figures to this file, a line a row")
    judging.add_argument("--nearest", type=Path, metavar="PNG", help="draw a figure of nearest training images")
    judging.add_argument("--record", action="store_true", help="write the means into the weights file, as its figures")
    judging.add_argument("--train-judge", action="store_true", help="train the judges on real images, then stop")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def train_judges(args) -> list[Path]:
    """Train a judge for each domain of the data; returns their files."""
    check_output_folder(args.judges)
    paths = []
    for domain, images in read_digits(args.data or DATA, size=IMAGE_SIZE).items():
        options = {"seed": args.seed, "precision": args.precision, "device": args.device}
        paths.append(train_judge(domain, images, EPOCHS[domain], args.judges, **options))
        about = load_tensors(paths[-1])[1]
        print(f"{paths[-1]}: {percent(about['held_out_accuracy'])} of {about['held_out']} held-out images right")
    return paths


def main(args) -> list[dict[str, Any]] | list[Path]:
    """Judge, print, and return the figures, one dictionary a row; with --train-judge, the judges' files."""
    if args.train_judge:
        return train_judges(args)
    if args.out and args.seeds:
        raise UserError(f"--seeds: {args.out} is already drawn; leave out one of the two")
    if args.out and args.record:
        raise UserError(f"--record: nobody knows which weights drew {args.out}; name --seeds instead")
    if args.count < 1 or args.batch_size < 1:
        raise UserError(f"--count {args.count} --batch-size {args.batch_size}: both start at 1")
    check_json(args.json)
    if args.nearest:
        check_output_folder(args.nearest.parent)
    judges = {domain: load_judge(args.judges, domain) for domain in DOMAINS}
    classifier = load_classifier(args.classifier) if args.classifier else None
    if args.out:
        drawn = {str(args.out): read_graded(args.out, args.layout)}
        facts = {"layout": args.layout}
    else:
        sampler = make_sampler(args)
        options = sampling_options(args, sampler)
        if sampler.domains != DOMAINS:
            raise UserError(f"{args.weights}: draws {', '.join(sampler.domains)}, not digits; name another file")
        drawn = {
            f"seed {seed}": draw_sets(sampler, args.layout, args.count, seed, options, args.batch_size)
            for seed in args.seeds or [args.seed]
        }
        facts = {"layout": args.layout, "weights": str(args.weights), "step": sampler.about.get("step")} | options
    real = read_real(args.data)
    if args.nearest and not real:
        raise UserError("--nearest: needs the real images; name their folder with --data")
    results = [{"source": source} | facts | score(sets, judges, classifier, real) for source, sets in drawn.items()]
    report(results)
    if args.record:
        record(args.weights, args.layout, args.seeds or [args.seed], options, results)
    if args.nearest:
        show_nearest(args.nearest, next(iter(drawn.values())), judges, real)
    if args.json:
        try:
            with open(args.json, "a") as file:
                file.writelines(json.dumps(result) + "\n" for result in results)
        except OSError as error:
            raise UserError(f"{args.json}: cannot be written ({error.strerror}); choose another file") from None
    return results


if __name__ == "__main__":
    run(main, parse_arguments())

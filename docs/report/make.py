"""Make the report: every figure that the course asks for, drawn now, with what was measured, as one HTML file.

python docs/report/make.py                                   # the shipped weights, into outputs/report/index.html
python docs/report/make.py --p1-weights runs/p1/model.safetensors --only p1

Each figure is made by a program of the repository, whose command stands beside it; numbers are read from what those
programs wrote. What lacks weights or data is said to be missing. The file needs no network, and prints on A4.
"""

import datetime
import hashlib
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from common.checkpoint import load_about, write_atomically
from common.cli import Parser, UserError, progress, run, say
from common.images import check_output_folder
from docs.report.page import Part, Table, page
from docs.report.sections import SECTIONS, Command, Section
from docs.report.tables import ROOT, shown
from docs.report.texts import TEXTS

MINIATURE = ROOT / "latent_diffusion" / "miniature" / "weights"

TITLE = "Diffusion models: the report"
INTRODUCTION = (
    "Every figure that the course's three problems ask for, in the Fall 2025 and Fall 2024 editions, drawn for this"
    " page by the commands that stand beside them. Numbers were read from what the evaluations wrote, as it says under"
    " each table.",
)


class Runner:
    """Runs the commands of the sections, each of them once however many sections share it.

    Attributes:
        seconds: that each command took.
        failures: the last line that each failing command said.
    """

    def __init__(self):
        self.seconds: dict[tuple[str, ...], float] = {}
        self.failures: dict[tuple[str, ...], str] = {}

    @staticmethod
    def words(command: Command) -> tuple[str, ...]:
        """The command's words after `python`, with paths as seen from the repository's folder."""
        return tuple(shown(word) if isinstance(word, Path) else str(word) for word in command.words)

    def run(self, command: Command) -> str:
        """Run a command from the repository's folder, unless that was done; returns why it failed, or nothing."""
        words = self.words(command)
        if words not in self.seconds:
            for file in command.makes:  # what an earlier report left must not pass for new
                file.unlink(missing_ok=True)
            say(f"python {shlex.join(words)}")
            start = perf_counter()
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
            self.seconds[words] = perf_counter() - start
            missing = [file for file in command.makes if not file.exists()]
            if done.returncode or missing:
                said = done.stderr.strip().splitlines() or [f"did not write {', '.join(map(shown, missing))}"]
                self.failures[words] = f"{words[0]}: {said[-1]}"
        return self.failures.get(words, "")


def part_of(section: Section, runner: Runner, seed: int) -> Part:
    """Draw a section, or say why it cannot be drawn."""
    key, text = section.key, TEXTS[section.key]
    if missing := [need for need in section.needs if not need.path.exists()]:
        said = " ".join(f"{shown(need.path)} is not there; to get it, {need.mend}." for need in missing)
        return Part(key, text, absent=f"Not drawn. {said}")
    for command in section.commands:
        if failure := runner.run(command):
            return Part(key, text, absent=f"Not drawn, since a command failed. {failure}")
    ran = [runner.words(command) for command in section.commands]
    return Part(
        key,
        text,
        figures=section.figures,
        tables=[table for read in section.tables for table in read()],
        commands=[(f"python {shlex.join(words)}", runner.seconds[words]) for words in ran],
        seed=seed,
        wide=section.wide,
    )


def weights_rows(paths: Sequence[Path]) -> list[list[str]]:
    """A row a weights file: the beginning of its SHA-256, and what it says of its training."""
    rows = []
    for path in paths:
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        for file in files:
            with open(file, "rb") as opened:
                facts = [f"SHA-256 {hashlib.file_digest(opened, 'sha256').hexdigest()[:16]}"]
            about = load_about(file) if file.suffix == ".safetensors" else {}
            facts += [
                f"{name.replace('_', ' ')} {about[name]}" for name in ("step", "validation_loss") if name in about
            ]
            rows.append([shown(file), ", ".join(facts)])
    return rows


def facts(args: Namespace, seconds: float) -> Table:
    """What the report was made with: weights, versions, machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    rows = weights_rows([args.p1_weights, args.p2_weights, args.p3_base, args.p3_words, args.p3_custom])
    rows += weights_rows([args.p3_controlnet or ROOT / "p3_controlnet" / "weights" / "controlnet"])
    rows += [
        ["made", f"{datetime.datetime.now():%Y-%m-%d %H:%M}, in {seconds:.0f} s"],
        ["machine", f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}"],
        ["versions", f"Python {platform.python_version()}, torch {torch.__version__}"],
    ]
    if not revision.returncode:
        rows.append(["revision", revision.stdout.strip()])
    return Table("", ["", ""], rows, "the files themselves, and this machine")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="make.py", description=__doc__)
    report = parser.add_argument_group("report")
    report.add_argument("--out", type=Path, default=ROOT / "outputs" / "report", help="folder of the report")
    report.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which problems")
    report.add_argument("--seed", type=int, default=0, help="of all figures")
    p1 = parser.add_argument_group("problem 1")
    digits = ROOT / "p1_ddpm" / "weights" / "digits.safetensors"
    p1.add_argument("--p1-weights", type=Path, default=digits, help="weights of train.py")
    p1.add_argument("--p1-data", type=Path, help="the course's digits folder, if not hw2_data/digits")
    p1.add_argument("--p1-classifier", type=Path, help="the course's Classifier.pth, which then judges too")
    p2, faces = parser.add_argument_group("problem 2"), ROOT / "p2_ddim"
    p2.add_argument("--p2-weights", type=Path, default=faces / "weights" / "faces.safetensors", help="or UNet.pt")
    p2.add_argument("--p2-noise", type=Path, default=faces / "examples" / "noise", help="folder with 00.pt, 01.pt, ...")
    p2.add_argument("--p2-truth", type=Path, default=faces / "examples" / "GT", help="folder with 00.png, 01.png, ...")
    p3, shipped = parser.add_argument_group("problem 3, Fall 2025"), ROOT / "p3_controlnet"
    p3.add_argument(
        "--p3-base",
        type=Path,
        default=MINIATURE / "base",
        help="or sd-v1-4.ckpt",
    )
    p3.add_argument("--p3-controlnet", type=Path, help="folder or file (default: as sample.py chooses)")
    p3.add_argument("--p3-examples", type=Path, default=shipped / "examples", help="prompt.json, source/ and target/")
    new, own = parser.add_argument_group("problem 3, Fall 2024"), ROOT / "p3_personalization"
    new.add_argument(
        "--p3-clip",
        type=Path,
        default=MINIATURE / "clip",
        help="CLIP in transformers' format",
    )
    new.add_argument("--p3-zeroshot", type=Path, help="folder with id2label.json and val/ (default: drawn circles)")
    new.add_argument("--p3-table", type=Path, default=own / "examples" / "input.json", help="the course's input.json")
    new.add_argument("--p3-references", type=Path, default=own / "examples", help="a folder of photos a concept")
    new.add_argument("--p3-words", type=Path, default=own / "weights" / "words.safetensors", help="learned words")
    new.add_argument(
        "--p3-custom", type=Path, default=own / "weights" / "custom.safetensors", help="Custom Diffusion's"
    )
    return parser.parse_args(argv)


def check_named(args: Namespace) -> None:
    """Make sure that every file that the caller named is there; only what is missing by default is told in the report.

    Raises:
        UserError: one is not.
    """
    defaults = parse_arguments([])
    for name, value in vars(args).items():
        if name != "out" and isinstance(value, Path) and value != getattr(defaults, name) and not value.exists():
            raise UserError(f"--{name.replace('_', '-')} {value}: no such file or folder; check the path")


def main(args) -> Path:
    """Run the programs and write the page; returns its path.

    Raises:
        UserError: a named file is missing, the folder cannot be written, or a command failed; then the page is there.
    """
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: seeds are whole numbers from 0")
    check_named(args)
    check_output_folder(args.out)
    for name, value in vars(args).items():
        if isinstance(value, Path):  # the programs run in the repository's folder, not in the caller's
            setattr(args, name, value.absolute())
    start, runner = perf_counter(), Runner()
    sections = [section for name, make in SECTIONS.items() if name in args.only for section in make(args)]
    parts = [part_of(section, runner, args.seed) for section in progress(sections, "report", "section")]
    text = page(TITLE, INTRODUCTION, facts(args, perf_counter() - start), parts)
    path = args.out / "index.html"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    absent = [part.text.title for part in parts if part.absent]
    left_out = f", without: {'; '.join(absent)}" if absent else ""
    say(f"{path}: {len(parts) - len(absent)} of {len(parts)} sections{left_out}")
    if runner.failures:
        raise UserError("; ".join(runner.failures.values()) + f"; the rest is in {path}")
    return path


if __name__ == "__main__":
    run(main, parse_arguments())

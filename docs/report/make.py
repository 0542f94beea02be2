"""Make the report: every figure that the course asks for, drawn now, with what was measured, as one HTML page.

python docs/report/make.py                                                     # the shipped weights
python docs/report/make.py --only p1 --p1-weights runs/p1/model.safetensors    # your own, judged here

A program of the repository draws each figure, and the page shows its command. What the shipped weights reach is read
from docs/results/; your own weights are judged by the same programs. The page needs no network.
"""

import base64
import json
import mimetypes
import platform
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # isort: split

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from torch import Tensor

from common.cli import Parser, UserError, check, progress, run, say
from common.images import add_captions, grid, read_image, save_png
from common.output import check_output_folder, write_atomically
from p2_ddim.evaluate import images_in

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
# The commands of each problem, under the name of the folder that they fill. Each needs what the one before it made.
# A part in brackets is left out where its name has no value, since the programs have defaults of their own.
COMMANDS = {
    "p1": {
        "p1_figures": ["p1_ddpm/figures.py --out {out}/p1_figures [--weights {p1_weights}] --seed {seed}"],
        "p1_2025": [
            "p1_ddpm/sample.py {out}/p1_2025 [--weights {p1_weights}] --seed {seed} --overwrite",
            "p1_ddpm/evaluate.py {out}/p1_2025 --json {out}/p1_2025.json",
        ],
        "p1_2024": [
            "p1_ddpm/sample.py {out}/p1_2024 --layout 2024 [--weights {p1_weights}] --seed {seed} --overwrite",
            "p1_ddpm/evaluate.py {out}/p1_2024 --layout 2024 --json {out}/p1_2024.json",
        ],
    },
    "p2": {
        "p2_figures": [
            "p2_ddim/figures.py --out {out}/p2_figures --only eta strips --noise {p2_examples}/noise"
            " [--weights {p2_weights}] --seed {seed}"
        ],
        "p2": [
            "p2_ddim/sample.py {p2_examples}/noise {out}/p2 [{p2_weights}] --seed {seed}",
            "p2_ddim/evaluate.py {out}/p2 {p2_examples}/GT --json {out}/p2.json",
        ],
    },
    "p3": {
        "p3_figures": [
            "p3_controlnet/figures.py --out {out}/p3_figures --only sides two strength [--base {p3_base}]"
            " [--controlnet {p3_controlnet}] --seed {seed}"
        ],
        "p3": [
            "p3_controlnet/sample.py p3_controlnet/examples/prompt.json p3_controlnet/examples {out}/p3 [{p3_base}]"
            " [--controlnet {p3_controlnet}] --seed {seed}",
            "p3_controlnet/evaluate.py p3_controlnet/examples/prompt.json p3_controlnet/examples {out}/p3"
            " --json {out}/p3.json",
        ],
    },
    "p3-2024": {
        "p3_zeroshot": [
            "p3_personalization/zeroshot.py [{p3_zeroshot}] [--clip {p3_clip}] --out {out}/p3_zeroshot"
            " --json {out}/p3_zeroshot.json"
        ],
        "p3_2024_figures": [
            "p3_personalization/figures.py --out {out}/p3_2024_figures --table {p3_concepts}/input.json --references"
            " {p3_concepts} [--base {p3_base}] [--words {p3_words}] [--custom {p3_custom}] --seed {seed}"
        ],
        "p3_2024": [
            "p3_personalization/generate.py {p3_concepts}/input.json {out}/p3_2024 [{p3_base}] [--words {p3_words}]"
            " --seed {seed} --overwrite",
            "p3_personalization/evaluate.py {p3_concepts}/input.json {out}/p3_2024 {p3_concepts} [--clip {p3_clip}]"
            " --json {out}/p3_2024.json",
        ],
    },
}
# What is judged only if one of these flags names your own weights; docs/results has it of the shipped ones.
JUDGED = {
    "p1_2025": ("p1_weights",),
    "p1_2024": ("p1_weights",),
    "p3_2024": ("p3_base", "p3_words"),
}
FACES = 4  # shown beside their ground truth
FACE_SIDE = 256  # pixels that small faces are enlarged to
CONTRAST = 50  # what the difference of two faces is multiplied by; else it looks black


@dataclass
class Outcome:
    """What became of the commands of one name: each with its seconds, and why the last one failed, if it did."""

    commands: list[tuple[str, float]] = field(default_factory=list)
    failure: str = ""


def shown(path: Path) -> str:
    """A path as you would type it in the repository's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def words_of(command: str, values: Mapping[str, Any]) -> list[str]:
    """The words of a command of `COMMANDS`, with the values filled in; these may hold spaces."""

    def keep_if_given(part: re.Match) -> str:
        return part[1] if all(values[name] for name in re.findall(r"{(\w+)}", part[1])) else ""

    return [word.format_map(values) for word in shlex.split(re.sub(r"\[(.*?)\]", keep_if_given, command))]


def plan_commands(args: Namespace) -> dict[str, list[list[str]]]:
    """The words of all commands that the report needs, by the name of what they make."""
    values = {name: shown(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        name: [words_of(command, values) for command in commands]
        for problem in args.only
        for name, commands in COMMANDS[problem].items()
        if name not in JUDGED or any(values[flag] for flag in JUDGED[name])
    }


def call(commands: Sequence[list[str]]) -> Outcome:
    """Run programs in the repository's folder, up to the first that fails."""
    outcome = Outcome()
    for words in commands:
        line = f"python {shlex.join(words)}"
        say(line)
        start = perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        outcome.commands.append((line, perf_counter() - start))
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            outcome.failure = f"{words[0]}: {said[-1]}"
            break
    return outcome


def compare_faces(drawn: Path, truth: Path, errors: Mapping[str, float]) -> Tensor:
    """The first faces of a folder above their ground truth and the difference of the two: uint8 (3, height, width).

    `errors` are mean squared errors by file name.
    """
    names = [name for name in errors if name != "mean"][:FACES]
    stems = [Path(name).stem for name in names]
    ours, theirs = (
        torch.stack([torch.from_numpy(read_image(files[name], None).copy()).permute(2, 0, 1) for name in stems])
        for files in (images_in(drawn), images_in(truth))
    )
    difference = (CONTRAST * (ours.int() - theirs.int()).abs()).clamp(max=255).to(torch.uint8)
    picture = grid(torch.cat([ours, theirs, difference]), len(names), max(1, FACE_SIDE // ours.shape[-1]))
    columns = [f"{Path(name).stem}, MSE {errors[name]:.4f}" for name in names]
    return add_captions(picture, ["drawn", "ground truth", f"{CONTRAST} x difference"], columns)


def embed(content: bytes | Path, kind: str = "") -> str:
    """A picture, or a picture file, as an address that holds all of it."""
    if isinstance(content, Path):
        content, kind = content.read_bytes(), mimetypes.guess_type(content)[0]
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def draw_equation(tex: str) -> str:
    """An equation, in matplotlib's TeX, as the address of an SVG that needs no font of the reader's."""
    from matplotlib import font_manager, mathtext  # here, because it takes a second to import

    svg = BytesIO()
    mathtext.math_to_image(f"${tex}$", svg, font_manager.FontProperties(size=13), format="svg")
    return embed(svg.getvalue(), "image/svg+xml")


def decimal(value: Any, digits: int = 3, factor: float = 1) -> str:
    """A rounded number, or a mean with its standard error; a dash for what was not measured."""
    if value is None or isinstance(value, Undefined):
        return "-"
    if not isinstance(value, Mapping):
        return f"{factor * value:.{digits}f}"
    parts = [value["mean"], value["standard_error"]]
    return " ± ".join(decimal(part, digits, factor) for part in parts if part is not None)


def percent(value: Any, digits: int = 2) -> str:
    """The same for a share."""
    text = decimal(value, digits, 100)
    return text if text == "-" else f"{text} %"


def render(args: Namespace, outcomes: Mapping[str, Outcome], seconds: float) -> str:
    """The page, of what the commands made."""

    def read(name: str) -> tuple[Any, str]:
        """What an evaluation wrote, just now or into docs/results, and its path; None if it is not there."""
        file = (args.out if name in outcomes else RESULTS) / f"{name}.json"
        if (name in outcomes and outcomes[name].failure) or not file.exists():
            return None, shown(file)
        return json.loads(file.read_text()), shown(file)

    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = [
        f"{datetime.now():%Y-%m-%d %H:%M}, in {seconds:.0f} s",
        f"revision {revision.stdout.strip() or '-'}",
        f"{platform.machine()}, {torch.get_num_threads()} CPU thread(s)",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        f"Python {platform.python_version()}, torch {torch.__version__}",
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"percent": percent, "decimal": decimal}
    environment.globals |= {"read": read, "embed": embed, "equation": draw_equation}
    return environment.get_template("template.html").render(args=args, outcomes=outcomes, facts=facts)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="make.py", description=__doc__)
    report = parser.add_argument_group("report")
    report.add_argument("--out", type=Path, default=ROOT / "outputs" / "report", help="folder for the report")
    report.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="which problems to show")
    report.add_argument("--seed", type=int, default=0, help="seed of all figures")
    own = parser.add_argument_group("your own, in place of what is shipped")
    for name, metavar, text in (
        ("--p1-weights", "FILE", "weights of p1_ddpm/train.py"),
        ("--p2-weights", "FILE", "UNet.pt, or weights of p2_ddim/train.py"),
        ("--p3-base", "SD_CKPT", "the frozen Stable Diffusion"),
        ("--p3-controlnet", "PATH", "a ControlNet of p3_controlnet/train.py"),
        ("--p3-words", "FILE", "words that p3_personalization/textual_inversion.py learned"),
        ("--p3-custom", "FILE", "weights of p3_personalization/custom_diffusion.py"),
        ("--p3-clip", "FOLDER", "a CLIP model in transformers' format"),
        ("--p3-zeroshot", "FOLDER", "pictures to classify: id2label.json and val/"),
    ):
        own.add_argument(name, type=Path, metavar=metavar, help=text)
    faces, concepts = ROOT / "p2_ddim" / "examples", ROOT / "p3_personalization" / "examples"
    own.add_argument("--p2-examples", type=Path, default=faces, metavar="FOLDER", help="has noise/ and GT/")
    own.add_argument(
        "--p3-concepts", type=Path, default=concepts, metavar="FOLDER", help="has input.json and a folder a concept"
    )
    return parser.parse_args(argv)


def main(args) -> Path:
    """Run the programs and write the page; returns its path. If a command failed, the page is there and says so."""
    check("seed", args.seed, args.seed >= 0, "at least 0")
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.absolute())  # the programs run in the repository's folder, not in yours
            check(name, value, name == "out" or value.exists(), "a file or folder that is there")
    check_output_folder(args.out)
    start = perf_counter()
    plan = plan_commands(args)
    outcomes = {name: call(plan[name]) for name in progress(list(plan), "report", "part")}
    if "p2" in outcomes and not outcomes["p2"].failure:
        errors = json.loads((args.out / "p2.json").read_text())
        save_png(args.out / "p2_truth.png", compare_faces(args.out / "p2", args.p2_examples / "GT", errors))
    text = render(args, outcomes, perf_counter() - start)
    path = args.out / "index.html"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if failures := [outcome.failure for outcome in outcomes.values() if outcome.failure]:
        raise UserError(f"{'; '.join(failures)}; the rest is in {path}")
    say(str(path))
    return path


if __name__ == "__main__":
    run(main, parse_arguments())

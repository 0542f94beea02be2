"""What the course asks for, figure by figure: what makes it, what it needs, and what is measured beside it."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from docs.report import tables
from docs.report.page import Figure, Table


@dataclass(frozen=True)
class Command:
    """A program of the repository with its arguments, and the files that it makes for the report."""

    words: Sequence[str | Path]
    makes: Sequence[Path]


@dataclass(frozen=True)
class Need:
    """A file or folder without which a section cannot be drawn, and how to get it."""

    path: Path
    mend: str


@dataclass(frozen=True)
class Section:
    """One figure of the report, or some that belong together; its words stand in texts.py under its key."""

    key: str
    needs: Sequence[Need]
    commands: Sequence[Command]
    figures: Sequence[Figure]
    tables: Sequence[Callable[[], list[Table]]] = field(default_factory=tuple)
    wide: bool = False


def digits(args: Namespace) -> list[Section]:
    """Problem 1, both editions."""
    figures, weights, seed = args.out / "p1_figures", args.p1_weights, ["--seed", args.seed]
    needs = [Need(weights, "train some with p1_ddpm/train.py, or restore the file with git")]
    data = ["--data", args.p1_data] if args.p1_data else []
    drawing = Command(
        ["p1_ddpm/figures.py", "--out", figures, "--weights", weights, *data, *seed],
        [figures / name for name in ("grid_2025.png", "grid_2024_mnistm.png", "grid_2024_svhn.png",
                                     "reverse_process.png", "reverse_process.gif", "guidance.png")],
    )  # fmt: skip

    def judged(layout: str) -> tuple[list[Command], list[Callable[[], list[Table]]]]:
        """How the graded images of a layout are drawn and judged, and the tables of that."""
        drawn, numbers = args.out / f"p1_{layout}", args.out / f"p1_{layout}.jsonl"
        classifier = ["--classifier", args.p1_classifier] if args.p1_classifier else []
        commands = [
            Command(["p1_ddpm/sample.py", drawn, "--layout", layout, "--weights", weights, *seed, "--overwrite"], []),
            Command(
                ["p1_ddpm/evaluate.py", drawn, "--layout", layout, "--json", numbers, *data, *classifier], [numbers]
            ),
        ]
        return commands, [lambda: tables.digits_now(numbers), lambda: tables.digits_recorded(weights, layout)]

    commands_2025, tables_2025 = judged("2025")
    commands_2024, tables_2024 = judged("2024")
    return [
        Section(
            "p1-2025",
            needs,
            [drawing, *commands_2025],
            [Figure(figures / "grid_2025.png", "Rows 0 to 9: even ones MNIST-M, odd ones SVHN.")],
            tables_2025,
        ),
        Section(
            "p1-2024",
            needs,
            [drawing, *commands_2024],
            [Figure(figures / "grid_2024_mnistm.png", "MNIST-M."), Figure(figures / "grid_2024_svhn.png", "SVHN.")],
            tables_2024,
        ),
        Section(
            "p1-process",
            needs,
            [drawing],
            [
                Figure(figures / "reverse_process.png", "xt, and beneath it the x0 predicted from it."),
                Figure(figures / "reverse_process.gif", "The same as a film.", moving=True),
            ],
            wide=True,
        ),
        Section(
            "p1-guidance",
            needs,
            [drawing],
            [Figure(figures / "guidance.png", "A row a guidance scale.")],
            wide=True,
        ),
    ]


def faces(args: Namespace) -> list[Section]:
    """Problem 2."""
    figures, drawn, numbers = args.out / "p2_figures", args.out / "p2", args.out / "p2.json"
    noise, weights, truth = args.p2_noise, args.p2_weights, args.p2_truth
    needs = [
        Need(weights, "name the course's with make report P2_WEIGHTS=UNet.pt, or train some with p2_ddim/train.py"),
        Need(noise, "name the folder of noises with P2_NOISE=..."),
    ]
    drawing = Command(
        ["p2_ddim/figures.py", noise, figures, weights, "--only", "eta", "strips", "--seed", args.seed],
        [figures / name for name in ("eta.png", "strip_slerp.png", "strip_lerp.png", "lengths.png")],
    )
    names = sorted(path.name for path in truth.glob("*.png"))
    graded = [
        Command(["p2_ddim/sample.py", noise, drawn, weights, "--seed", args.seed], [drawn / name for name in names]),
        Command(["p2_ddim/evaluate.py", drawn, truth, "--json", numbers], [numbers]),
    ]
    return [
        Section(
            "p2-eta",
            needs,
            [drawing],
            [Figure(figures / "eta.png", "A row an eta, a column a noise.")],
            wide=True,
        ),
        Section(
            "p2-between",
            needs,
            [drawing],
            [
                Figure(figures / "strip_slerp.png", "Slerp from 00 to 01, alpha 0.0 to 1.0."),
                Figure(figures / "strip_lerp.png", "Lerp from 00 to 01, alpha 0.0 to 1.0."),
                Figure(figures / "lengths.png", "Length of the noise on both ways."),
            ],
            wide=True,
        ),
        Section(
            "p2-truth",
            [*needs, Need(truth, "name the folder of the course's images with P2_TRUTH=...")],
            graded,
            [Figure(drawn / name, f"Drawn from the noise {Path(name).stem}.") for name in names[:4]],
            [lambda: tables.squared_errors(numbers)],
        ),
    ]


def circles(args: Namespace) -> list[Section]:
    """Problem 3, Fall 2025."""
    figures, drawn, numbers = args.out / "p3_figures", args.out / "p3", args.out / "p3.json"
    examples, seed = args.p3_examples, ["--seed", args.seed]
    models = ["--controlnet", args.p3_controlnet] if args.p3_controlnet else []
    needs = [
        Need(args.p3_base, "restore it with git, or name another with P3_BASE=..."),
        Need(examples / "prompt.json", "make some with p3_controlnet/make_examples.py"),
    ]
    if args.p3_controlnet:
        needs.append(Need(args.p3_controlnet, "train one with p3_controlnet/train.py"))
    drawing = Command(
        ["p3_controlnet/figures.py", figures, "--only", "sides", "two", "strength", "--base", args.p3_base,
         "--examples", examples, *models, *seed],
        [figures / f"{name}.png" for name in ("sides", "two", "strength")],
    )  # fmt: skip
    judged = [
        Command(
            ["p3_controlnet/sample.py", examples / "prompt.json", examples, drawn, args.p3_base, *models, *seed], []
        ),
        Command(["p3_controlnet/evaluate.py", examples / "prompt.json", examples, drawn, "--json", numbers], [numbers]),
    ]
    return [
        Section(
            "p3-two",
            needs,
            [drawing, *judged],
            [Figure(figures / "two.png", "The control image, then four seeds for each prompt.")],
            [lambda: tables.several_circles(numbers)],
            wide=True,
        ),
        Section(
            "p3-sides",
            needs,
            [drawing, *judged],
            [Figure(figures / "sides.png", "Columns are examples.")],
            [lambda: tables.circle_summary(numbers)],
            wide=True,
        ),
        Section(
            "p3-strength",
            needs,
            [drawing],
            [Figure(figures / "strength.png", "A column a strength.")],
            wide=True,
        ),
    ]


def personalization(args: Namespace) -> list[Section]:
    """Problem 3, Fall 2024."""
    programs = Path(__file__).resolve().parents[2] / "p3_personalization"
    figures, drawn, zero = (args.out / name for name in ("p3_2024_figures", "p3_2024", "p3_zeroshot"))
    numbers, zero_numbers = args.out / "p3_2024.json", args.out / "p3_zeroshot.json"
    table, references = args.p3_table, args.p3_references
    words, custom, seed = args.p3_words, args.p3_custom, ["--seed", args.seed]
    learned = [
        Need(programs / "figures.py", "restore it with git"),
        Need(args.p3_base, "restore it with git, or name another with P3_BASE=..."),
        Need(table, "name the course's with P3_TABLE=input.json"),
        Need(words, "learn words with p3_personalization/textual_inversion.py"),
    ]
    both = [*learned, Need(custom, "learn them with p3_personalization/custom_diffusion.py")]
    data = [args.p3_zeroshot] if args.p3_zeroshot else []
    zero_seed = [] if data else seed
    drawing = Command(
        ["p3_personalization/figures.py", figures, "--table", table, "--references", references, "--base", args.p3_base,
         "--words", words, "--custom", custom, *seed],
        [figures / name for name in ("learned.png", "both.png", "both.json")],
    )  # fmt: skip
    return [
        Section(
            "p3-2024-zeroshot",
            [
                Need(programs / "zeroshot.py", "restore it with git"),
                Need(args.p3_clip, "name a CLIP folder in transformers' format with P3_CLIP=..."),
                *(Need(path, "name the folder with id2label.json and val/") for path in data),
            ],
            [
                Command(
                    [
                        "p3_personalization/zeroshot.py",
                        *data,
                        "--clip",
                        args.p3_clip,
                        "--out",
                        zero,
                        "--json",
                        zero_numbers,
                        *zero_seed,
                    ],
                    [zero / "examples.png", zero / "confusion.png", zero_numbers],
                )
            ],
            [
                Figure(zero / "examples.png", "Left what CLIP gets right, right what it gets wrong."),
                Figure(zero / "confusion.png", "Which class (row) is given which name (column)."),
            ],
            [lambda: tables.zero_shot(zero_numbers)],
        ),
        Section(
            "p3-2024-words",
            both,
            [
                drawing,
                Command(
                    [
                        "p3_personalization/generate.py",
                        table,
                        drawn,
                        args.p3_base,
                        "--words",
                        words,
                        *seed,
                        "--overwrite",
                    ],
                    [],
                ),
                Command(
                    [
                        "p3_personalization/evaluate.py",
                        table,
                        drawn,
                        references,
                        "--clip",
                        args.p3_clip,
                        "--json",
                        numbers,
                    ],
                    [numbers],
                ),
            ],
            [Figure(figures / "learned.png", "Learned from, and drawn.")],
            [lambda: tables.learned_words(numbers)],
            wide=True,
        ),
        Section(
            "p3-2024-both",
            both,
            [drawing],
            [Figure(figures / "both.png", "A row a method, a column a noise.")],
            [lambda: tables.two_concepts(figures / "both.json")],
            wide=True,
        ),
    ]


SECTIONS = {"p1": digits, "p2": faces, "p3": circles, "p3-2024": personalization}

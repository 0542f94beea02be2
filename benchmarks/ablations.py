"""Measure what the choices of the three problems are worth: each left out or changed, everything else kept.

    python benchmarks/ablations.py                          # which there are, and which have been measured
    python benchmarks/ablations.py p1-guidance              # measures one and prints its table
    python benchmarks/ablations.py p1-guidance --write      # and keeps its figures, and fills in its page in docs/
    python benchmarks/ablations.py tables                   # fills in the pages from the figures that are kept

Each has settings of its own (python benchmarks/ablations.py p1-guidance --help), which are printed beside its figures.
Those that train keep their runs in outputs/ablations: the same command again goes on where it was stopped.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ablation_tables import ROOT, Ablation, changed, fingerprint, measured_text, missing_text, told
from benchmarks.ablations_p1 import P1
from benchmarks.ablations_p2 import P2
from benchmarks.ablations_p3 import P3
from benchmarks.ablations_words import WORDS
from benchmarks.pages import write_blocks
from common.cli import Parser, UserError, add_json_argument, check_json, run, say, write_json

ABLATIONS: dict[str, Ablation] = P1 | P2 | P3 | WORDS
DOCS = ROOT / "docs"


def figures_file(docs: Path, name: str) -> Path:
    """Where the figures of an ablation are kept."""
    return docs / "ablations" / f"{name}.json"


def stored(docs: Path, name: str) -> dict[str, Any] | None:
    """The figures of an ablation that are kept; None if it has not been measured.

    Raises:
        UserError: the file is there but not JSON.
    """
    path = figures_file(docs, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); remove it and measure anew") from None


def block_text(docs: Path, name: str) -> str:
    """What the page is to say of an ablation now."""
    result = stored(docs, name)
    return missing_text(name) if result is None else measured_text(name, ABLATIONS[name], result)


def measure(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure an ablation: its rows, and with what settings and weights, ready for JSON."""
    ablation = ABLATIONS[name]
    weights = {what: fingerprint(settings[what]) for what in ablation.weights if settings[what].exists()}
    rows = ablation.measure(settings)
    told_settings = {key: told(value) for key, value in settings.items()}
    return {"settings": told_settings, "flags": changed(ablation, settings), "weights": weights, "rows": rows}


def state(docs: Path, name: str) -> str:
    """Whether an ablation has been measured, in a word or a few."""
    result, ablation = stored(docs, name), ABLATIONS[name]
    if result is None:
        return "not measured"
    now = {what: ablation.settings[what][0] for what in ablation.weights}
    same = all(result["weights"].get(what) == fingerprint(path) for what, path in now.items() if path.exists())
    return "measured" if same else "measured with other weights"


def list_all(docs: Path) -> dict[str, str]:
    """Print which ablations there are and whether they have been measured; returns the latter."""
    states = {name: state(docs, name) for name in ABLATIONS}
    for name, ablation in ABLATIONS.items():
        print(f"{name:<16} {ablation.about} ({ablation.page}): {states[name]}")
    return states


def write_tables(docs: Path) -> None:
    """Fill in all blocks of all pages from the figures that are kept."""
    for page in dict.fromkeys(ablation.page for ablation in ABLATIONS.values()):
        names = [name for name, ablation in ABLATIONS.items() if ablation.page == page]
        write_blocks(docs / page, {name: block_text(docs, name) for name in names})
        say(f"{docs / page}: {', '.join(names)}")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="ablations.py", description=__doc__)
    pages = parser.add_argument_group("pages")
    pages.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages and of the figures that are kept")
    kinds = parser.add_subparsers(dest="name", metavar="NAME", help="what to measure")
    kinds.add_parser("tables", prog="ablations.py tables", help="fill in the pages from the figures that are kept")
    for name, ablation in ABLATIONS.items():
        kind = kinds.add_parser(name, prog=f"ablations.py {name}", description=ablation.about, help=ablation.about)
        add_json_argument(kind)
        pages = kind.add_argument_group("page")
        pages.add_argument("--write", action="store_true", help="keep the figures, and write the table into its page")
        group = kind.add_argument_group("settings")
        for key, (default, about) in ablation.settings.items():
            several = isinstance(default, list)
            kind_of = type(default[0] if several else default)
            group.add_argument(
                "--" + key.replace("_", "-"), type=kind_of, nargs="+" if several else None, default=default, help=about
            )
    return parser.parse_args(argv)


def main(args) -> dict[str, Any] | None:
    """Measure one ablation and return its figures; without a name, list all and return their states.

    Raises:
        UserError: bad settings, weights or data, or a page that lacks the block.
    """
    if args.name is None:
        return list_all(args.docs)
    if args.name == "tables":
        return write_tables(args.docs)
    ablation = ABLATIONS[args.name]
    settings = {key: getattr(args, key) for key in ablation.settings}
    for key, value in settings.items():
        least = min(value) if isinstance(value, list) else value
        if isinstance(least, int | float) and least < 0:
            raise UserError(f"--{key.replace('_', '-')} {told(value)}: must not be below 0")
    check_json(args.json)
    page = args.docs / ablation.page
    if args.write:  # before minutes of measuring
        write_blocks(page, {args.name: block_text(args.docs, args.name)})
    result = measure(args.name, settings)
    print(measured_text(args.name, ablation, result))
    write_json(args.json, result)
    if args.write:
        write_json(figures_file(args.docs, args.name), result)
        write_blocks(page, {args.name: block_text(args.docs, args.name)})
        say(f"\n{args.name}: in {page}")
    return result


if __name__ == "__main__":
    run(main, parse_arguments())

"""Measure what the choices of the three problems are worth: each left out or changed, everything else kept.

    python benchmarks/ablations.py p1-guidance              # measures one and prints its table
    python benchmarks/ablations.py p1-guidance --write      # keeps the figures, and puts the table on its page in docs/

`--help` lists them. Each has its own settings, with a `--help` of their own; they are printed below its table. Those
that train keep their runs in outputs/ablations: the same command again resumes.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

from benchmarks.ablation_tables import ROOT, WEIGHTS, fingerprint, make_text, replace_block
from benchmarks.ablations_p1 import P1
from benchmarks.ablations_p2 import P2
from benchmarks.ablations_p3 import P3
from common.cli import Parser, format_default, run, say
from common.output import write_atomically, write_json

ABLATIONS = P1 | P2 | P3
DOCS = ROOT / "docs"


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="ablations.py", description=__doc__)
    kinds = parser.add_subparsers(dest="name", metavar="NAME", required=True, help="what to measure")
    for name, ablation in ABLATIONS.items():
        about = ablation.measure.__doc__
        kind = kinds.add_parser(name, prog=f"ablations.py {name}", description=about, help=about)
        pages = kind.add_argument_group("page")
        pages.add_argument("--write", action="store_true", help="keep the figures, and put the table on its page")
        group = kind.add_argument_group("settings")
        for key, (default, text) in ablation.settings.items():
            several = {"nargs": "+", "type": type(default[0])} if isinstance(default, list) else {"type": type(default)}
            group.add_argument("--" + key.replace("_", "-"), default=default, help=text, **several)
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Measure one ablation and return its figures."""
    ablation, page = ABLATIONS[args.name], DOCS / f"{args.name.partition('-')[0]}.md"
    if args.write:
        replace_block(page, args.name, "")  # a page without the block is told before minutes of measuring
    settings = {key: getattr(args, key) for key in ablation.settings}
    typed = {key: format_default(value) for key, value in settings.items()}
    changed = [key for key, (default, _) in ablation.settings.items() if key != "out" and settings[key] != default]
    result = {
        "settings": typed,
        "flags": "".join(f" --{key.replace('_', '-')} {typed[key]}" for key in changed),
        "weights": {what: fingerprint(settings[what]) for what in WEIGHTS if what in settings},
        "rows": ablation.measure(settings),
    }
    text = make_text(args.name, ablation, result)
    print(text)
    if args.write:
        write_json(DOCS / "ablations" / f"{args.name}.json", result)
        written = replace_block(page, args.name, text)
        write_atomically(page, lambda temporary: temporary.write_text(written, encoding="utf-8"))
        say(f"\n{args.name}: in {page}")
    return result


if __name__ == "__main__":
    run(main, parse_arguments())

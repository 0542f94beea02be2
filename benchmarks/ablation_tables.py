"""What an ablation is, and how its figures become a table on a page of docs/."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
Settings = Mapping[str, Any]
Rows = list[dict[str, Any]]
WEIGHTS = ("weights", "base")  # settings whose files are fingerprinted
# A short run warms up quickly, and averages over the last part of itself.
SHORT = {"warmup": 20, "ema": 0.98, "save_every": 50}
RUNS = {"out": (ROOT / "outputs" / "ablations", "folder of the runs; a finished run is not trained again")}


@dataclass(frozen=True)
class Ablation:
    """One choice, and the measurement of what it is worth."""

    measure: Callable[[Settings], Rows]  # figures by heading, each row with its `variant`; its docstring is the help
    settings: Mapping[str, tuple[Any, str]]  # each with its default and its help; every one is a flag
    columns: Mapping[str, str]  # the headings, and the formats of their figures; what a row lacks is a dash
    facts: str  # the settings as a sentence, to be filled in
    first: str = ""  # heading of the variants


def fingerprint(path: Path) -> str:
    """The first 12 digits of the SHA-256 of a file, or of all files in a folder and their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(b"" if file == path else str(file.relative_to(path)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def run_folder(settings: Settings, variant: str) -> Path:
    """The folder of one training: another one for every variant and every change of the settings."""
    facts = {name: str(value) for name, value in settings.items() if name != "out"}
    facts |= {name: fingerprint(settings[name]) for name in WEIGHTS if name in settings}
    digest, name = hashlib.sha256(str(sorted(facts.items())).encode()).hexdigest(), re.sub(r"\W+", "-", variant)
    return settings["out"] / f"{name}-{digest[:8]}"


def make_text(name: str, ablation: Ablation, result: Mapping[str, Any]) -> str:
    """The table of a result (`rows`, `settings`, `flags` and `weights`, as in its JSON file), and how it was made."""
    lines = [[ablation.first, *ablation.columns], ["---", *["---:"] * len(ablation.columns)]]
    for row in result["rows"]:
        cells = ((row.get(heading), form) for heading, form in ablation.columns.items())
        lines.append([str(row["variant"]), *("-" if value is None else form.format(value) for value, form in cells)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    facts = ablation.facts.format(**result["settings"])
    weights = "".join(f"; the SHA-256 of the {what} begins with {digest}" for what, digest in result["weights"].items())
    return f"{table}\n\n{facts}{weights}. `python benchmarks/ablations.py {name}{result['flags']} --write`"


def replace_block(page: Path, name: str, content: str) -> str:
    """A page's text with new content between two comments that enclose a block; a `UserError` if it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{page}: has no block from {begin} to {end}; restore it")
    return f"{before}{begin}\n{content}\n{end}{after}"

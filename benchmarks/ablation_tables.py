"""What an ablation is, and how its figures become a table."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import table

ROOT = Path(__file__).resolve().parent.parent
Settings = Mapping[str, Any]
Rows = list[dict[str, Any]]
FINGERPRINT = 12  # hexadecimal digits of a SHA-256
PERCENT, ERROR = "{:.1%}", "{:.4g}"


@dataclass(frozen=True)
class Ablation:
    """One choice, and the measurement of what it costs to leave it out.

    Args:
        page: the page of docs/ that has its table.
        about: what is measured, for --help.
        settings: of the measurement, each with its default and what it says; every one is a flag.
        measure: from the settings to rows of figures, each with its `variant`.
        columns: from a heading to the name of a figure and its format; a figure that a row lacks is a dash.
        facts: the settings as a sentence, to be filled in.
        first: heading of the first column.
        weights: names of the settings that are weights; their fingerprints are kept with the figures.
    """

    page: str
    about: str
    settings: Mapping[str, tuple[Any, str]]
    measure: Callable[[Settings], Rows]
    columns: Mapping[str, tuple[str, str]]
    facts: str
    first: str = ""
    weights: Sequence[str] = ()


def fingerprint(path: Path) -> str:
    """The start of a SHA-256 of a file, or of all files in a folder and their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(b"" if file == path else str(file.relative_to(path)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:FINGERPRINT]


def told(value: Any) -> str:
    """A setting as it is printed: a path within the repository without the repository's own, lists with spaces."""
    if isinstance(value, Path):
        return str(value.relative_to(ROOT)) if value.is_relative_to(ROOT) else str(value)
    if isinstance(value, list):
        return " ".join(told(item) for item in value)
    return str(value)


def changed(ablation: Ablation, settings: Settings) -> str:
    """The flags of the settings that are not the defaults; where runs are kept changes no figure."""
    defaults = {key: default for key, (default, _) in ablation.settings.items() if key != "out"}
    return "".join(
        f" --{key.replace('_', '-')} {told(settings[key])}" for key in defaults if settings[key] != defaults[key]
    )


def command(name: str, flags: str = "") -> str:
    """What measures an ablation and writes its table."""
    return f"python benchmarks/ablations.py {name}{flags} --write"


def measured_text(name: str, ablation: Ablation, result: Mapping[str, Any]) -> str:
    """The table of what was measured, and beneath it how.

    Args:
        name: of the ablation.
        ablation: whose columns to show.
        result: `rows`, `settings`, `flags` and `weights` as they come from JSON.
    """
    rows = []
    for row in result["rows"]:
        cells = (
            "-" if row.get(figure) is None else format_.format(row[figure])
            for figure, format_ in ablation.columns.values()
        )
        rows.append([str(row["variant"]), *cells])
    facts = ablation.facts.format(**result["settings"])
    weights = "".join(f"; the SHA-256 of the {what} begins with {digest}" for what, digest in result["weights"].items())
    return f"{table([ablation.first, *ablation.columns], rows)}\n\n{facts}{weights}. `{command(name, result['flags'])}`"


def missing_text(name: str) -> str:
    """What stands in a page until there are figures."""
    return f"Not measured yet: run `{command(name)}`."

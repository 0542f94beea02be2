"""What the studio's pages share: checked values, weights read once, and a word on how far a drawing is."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, Generic, NamedTuple, TypeVar

from common.cli import UserError

Value = TypeVar("Value")


class Status(NamedTuple):
    """How far a drawing is: a line about it, and `done` of `total` steps; a total of 0 where nothing is going on."""

    text: str
    done: int = 0
    total: int = 0


NOTHING = Status("")


def number(name: str, value: Any, low: float, high: float) -> float:
    """A value of the page as a number from low to high.

    Raises:
        UserError: it is none, such as that of an emptied field, or out of range.
    """
    fits = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not fits:
        raise UserError(f"{name} {'is empty' if value is None else value}: choose from {low} to {high}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A value of the page as a whole number from low to high.

    Raises:
        UserError: it is no whole number, or out of range.
    """
    found = number(name, value, low, high)
    if found != int(found):
        raise UserError(f"{name} {value}: choose a whole number")
    return int(found)


def choice(name: str, value: Value, known: Sequence[Value]) -> Value:
    """A value of the page that must be one of those known.

    Raises:
        UserError: it is another.
    """
    if value not in known:
        raise UserError(f"{name} {'is empty' if value is None else value}: choose {', '.join(map(str, known))}")
    return value


def stamp(path: Path) -> list[tuple[Path, int]]:
    """A file, or all files of a folder, with the times of their last changes; nothing where nothing is."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(file, file.stat().st_mtime_ns) for file in files if file.exists()]


class Kept(Generic[Value]):
    """What a function makes of files: made when first asked for, and anew when a file has changed since.

    Args:
        make: called with the paths.
    """

    reading = RLock()  # for all of them: transformers patches torch's functions while it makes a model

    def __init__(self, make: Callable[..., Value]):
        self.make, self.key = make, None

    def __call__(self, *paths: Path) -> Value:
        key = [(path, stamp(path)) for path in paths]
        with self.reading:
            if key != self.key:
                self.value, self.key = self.make(*paths), key
            return self.value

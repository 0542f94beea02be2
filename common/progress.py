"""What a program says while it works: a bar on a terminal, elsewhere one line a phase; --quiet silences both."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Self, TypeVar

from tqdm import tqdm

LONG = 2.0  # seconds; a phase that is over sooner shows nothing

Item = TypeVar("Item")
_silent = False
_phases: list["Progress"] = []  # that are under way, the outermost first


@contextlib.contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """A block in which this module says nothing; results, warnings and errors are not its business."""
    global _silent
    before, _silent = _silent, _silent or silent
    try:
        yield
    finally:
        _silent = before


def speaks() -> bool:
    """Whether anything is said now: of several processes that share a run only the first one speaks."""
    return not _silent and os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print what was done, or what is being done; not for results that were asked for."""
    if speaks():
        print(line, flush=True)


class Progress:
    """How far a phase is: a bar where stderr is a terminal, else one line when it has taken `LONG` seconds.

    A phase within a phase has a bar that goes when it ends, and no line.

    Args:
        total: units of work in all.
        name: of the phase.
        unit: one of them, such as "step".
        done: how many are done already.

    Attributes:
        n: units done so far.
    """

    def __init__(self, total: int, name: str, unit: str, done: int = 0):
        self.total, self.name, self.unit, self.done = total, name, unit, done
        self.n, self.started = done, perf_counter()
        self.bar = None
        if speaks() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=name, unit=unit, leave=None, delay=LONG, dynamic_ncols=True)
        self.told = not speaks() or self.bar is not None

    def __enter__(self) -> Self:
        _phases.append(self)
        return self

    def __exit__(self, *_) -> None:
        _phases.remove(self)
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int = 1) -> None:
        """So many more units are done; fewer if something is done again."""
        self.n += n
        if self.bar is not None:
            self.bar.update(n)
        _phases[0].tell()

    def note(self, **numbers: str) -> None:
        """Show numbers beside the bar, if there is one."""
        if self.bar is not None:
            self.bar.set_postfix(**numbers)

    def tell(self) -> None:
        """Say the line, once."""
        seconds, done = perf_counter() - self.started, self.n - self.done
        if self.told or seconds < LONG:
            return
        self.told = True
        left = f", about {tqdm.format_interval(seconds * (self.total - self.n) / done)} left" if done > 0 else ""
        print(f"{self.name}: {self.total} {self.unit}{'s' * (self.total != 1)}{left}", file=sys.stderr, flush=True)


def progress(items: Sequence[Item], name: str, unit: str) -> Iterator[Item]:
    """The items, one after the other, with the progress through them."""
    with Progress(len(items), name, unit) as phase:
        for item in items:
            yield item
            phase.update()

"""How programs talk to their users: flags and help, progress, and mistakes that a user can mend."""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from time import perf_counter
from typing import Any, Self, TypeVar

from tqdm import tqdm

LONG = 2.0  # seconds; a phase that ends sooner shows nothing
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher of processes sets
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Item = TypeVar("Item")
Options = TypeVar("Options")
_silent = False
_notes: dict[str, str] = {}
_phases: list["Progress"] = []  # under way, the outermost first


class UserError(Exception):
    """A problem the user can mend; its text is one line that names the file or value and the mend."""


class Lossy(io.FileIO):
    """Where print goes: what nobody reads any more, as behind `head`, or a full disk does not take, ends no run."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and error.errno != errno.EPIPE:
                note("stdout", f"printed lines are lost ({error.strerror}); choose another disk")
            return len(data)


def lossy(stream: Any) -> Any:
    """A process's own stdout or stderr that writes as `Lossy`, to nowhere if it was closed; no letter is refused."""
    if stream is None:
        return open(os.devnull, "w")
    raw = io.BufferedWriter(Lossy(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)


def format_default(default: Any) -> str:
    """A flag's default as you would type it: paths below the current folder are shown relative to it."""
    if isinstance(default, list | tuple):
        return " ".join(map(format_default, default))
    if isinstance(default, Path) and default.is_relative_to(Path.cwd()):
        return os.path.relpath(default)
    return str(default)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and shows every flag's default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain_switch = action.const is True and action.default is False
        plain = action.default in (None, (), []) or plain_switch
        text = (action.help if plain else super()._get_help_string(action)) or ""
        return text.replace("%(default)s", format_default(action.default)).replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in `--help`, complains in one line, and has `--quiet`."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is getattr(sys, f"__{name}__"):  # not a notebook's or a test's
                setattr(sys, name, lossy(getattr(sys, name)))
        self._optionals.title = "general"
        # Without a default, so that a subcommand does not undo a --quiet before it.
        self.add_argument(
            "-q",
            "--quiet",
            action="store_true",
            default=argparse.SUPPRESS,
            help="hide progress; results, warnings and errors still print",
        )

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        if action.type is Path and not text:  # which Path takes for the current folder
            raise argparse.ArgumentError(action, "is empty; name a file or a folder")
        return super()._get_value(action, text)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def option(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field that is also a flag; `flag` goes to `add_argument`: choices, nargs, metavar, or type where the
    field's own type does not parse text.
    """
    return field(default=default, metadata={"help": help} | flag)


def add_options(parser: Any, options: type, leave_out: Sequence[str] = (), **defaults: Any) -> None:
    """Add a flag for every `option` field of a dataclass to a parser or group; `defaults` are other than its own.

    A bool becomes `--name` and `--no-name`, or only `--name` with `action="store_true"` in its `option`.
    """
    for item in fields(options):
        if "help" not in item.metadata or item.name in leave_out:
            continue
        flag = {"default": defaults.get(item.name, item.default)} | item.metadata
        if item.type is bool:
            flag.setdefault("action", argparse.BooleanOptionalAction)
        else:
            flag.setdefault("type", item.type)
        parser.add_argument("--" + item.name.replace("_", "-"), **flag)


def options_from(args: argparse.Namespace, options: type[Options]) -> Options:
    """The dataclass filled from parsed arguments; fields without a flag keep their defaults."""
    names = [item.name for item in fields(options) if hasattr(args, item.name)]
    return options(**{name: getattr(args, name) for name in names})


def check(name: str, value: Any, fine: bool, range_: str) -> None:
    """Raise a `UserError` that names the flag unless its value is fine: `--steps 0: must be above 0`."""
    if not fine:
        raise UserError(f"--{name.replace('_', '-')} {value}: must be {range_}")


def explain(error: Exception) -> str | None:
    """The line about an error that the user can mend; None for a bug."""
    text = str(error)
    if isinstance(error, UserError) or getattr(error, "errno", None) in FULL:
        return text
    if isinstance(error, MemoryError) or any(sign in text for sign in ("out of memory", "t allocate memory")):
        return "the memory is full; choose smaller batches or images, or end other programs"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile: {text.splitlines()[0]}; leave it out, or install a C++ compiler"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    return None


def interrupt(number: int, _) -> None:
    """Handle a signal as Ctrl-C."""
    raise KeyboardInterrupt(number)


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`, silenced if `--quiet` is among the arguments.

    What the user can mend, see `explain`, becomes one line on stderr and exit code 2. The process stands alone unless
    all that a launcher sets is there; schedulers set some of it. SIGTERM and a closed terminal end it as Ctrl-C does.
    """
    if not all(map(os.environ.get, LAUNCHED)):
        for name in LAUNCHED:
            os.environ.pop(name, None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, interrupt)
    try:
        with silence(getattr(args, "quiet", False)):
            main(args)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if (line := explain(error)) is None:
            raise
        print("error:", " ".join(line.split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + (stop.args or [signal.SIGINT])[0]) from None


@contextlib.contextmanager
def silence(silent: bool = True) -> Iterator[None]:
    """A block in which progress and `say` print nothing; results, warnings and errors still do."""
    global _silent
    before, _silent = _silent, _silent or silent
    try:
        yield
    finally:
        _silent = before


def speaks() -> bool:
    """Whether progress is printed: of several processes only the first one does."""
    return not _silent and os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print what was done or is being done; not for results that were asked for."""
    if speaks():
        print(line, flush=True)


def note(about: str, line: str) -> None:
    """Print a line on stderr about input that was not taken as it is; nothing if there was one of the same `about`."""
    if _notes.setdefault(about, line) is line and os.environ.get("RANK", "0") == "0":  # one step, as threads need it
        print(f"note: {line}", file=sys.stderr)


class Progress:
    """How far a phase is: a bar where stderr is a terminal, else one line once it has taken `LONG` seconds.

    A phase inside another has a bar that disappears at its end, and no line.

    Args:
        total: units of work in all, each a `unit`, such as "step".
        done: how many are done already; `n` counts on from there.
    """

    def __init__(self, total: int, name: str, unit: str, done: int = 0):
        self.total, self.name, self.unit, self.done = total, name, unit, done
        self.n, self.started = done, perf_counter()
        shown = {"leave": None, "delay": LONG, "dynamic_ncols": True, "disable": not (speaks() and sys.stderr.isatty())}
        self.bar = tqdm(total=total, initial=done, desc=name, unit=unit, **shown)
        self.told = not (speaks() and self.bar.disable)

    def __enter__(self) -> Self:
        _phases.append(self)
        return self

    def __exit__(self, *_) -> None:
        _phases.remove(self)
        self.bar.close()

    def update(self, n: int = 1) -> None:
        """Count n more units as done; a negative n takes some back."""
        self.n += n
        self.bar.update(n)
        _phases[0].tell()

    def tell(self) -> None:
        """Print the line, once."""
        seconds, done = perf_counter() - self.started, self.n - self.done
        if self.told or seconds < LONG:
            return
        self.told = True
        left = f", about {tqdm.format_interval(seconds * (self.total - self.n) / done)} left" if done > 0 else ""
        print(f"{self.name}: {self.total} {self.unit}{'s' * (self.total != 1)}{left}", file=sys.stderr, flush=True)


def progress(items: Sequence[Item], name: str, unit: str) -> Iterator[Item]:
    """The items, one after the other, with progress through them."""
    with Progress(len(items), name, unit) as phase:
        for item in items:
            yield item
            phase.update()

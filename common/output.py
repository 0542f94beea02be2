"""What programs leave on disk: files that are whole or not there, folders filled all at once, results as JSON."""

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from common.cli import UserError

UNFINISHED = ".unfinished-"
DAY = 24 * 60 * 60  # seconds


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file of the same name in a temporary folder, then move it to `path`, which is always whole.

    A `UserError` if the folder cannot be written or the disk is full; an earlier file at `path` is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder, because safetensors makes temporary files of its own beside the one that it is given.
        with temporary_folder(path.parent) as stage:
            temporary = stage / path.name
            write(temporary)
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            move_into_place(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); free space or choose another folder") from None


def move_into_place(file: Path, target: Path) -> None:
    """Give a finished file its name, with the usual permissions; safetensors makes its files private."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
    file.replace(target)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A folder in another, removed with the block.

    Those of processes that were killed are removed too; of other machines' processes, those that are a day old.
    """
    mine = socket.gethostname()
    for left in folder.glob(f"{UNFINISHED}*"):
        pid, _, host = left.name.removeprefix(UNFINISHED).rpartition("-")[0].partition("-")
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if not psutil.pid_exists(int(pid)) if host == mine else time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)
    prefix = f"{UNFINISHED}{os.getpid()}-{mine}-"
    with tempfile.TemporaryDirectory(dir=folder, prefix=prefix, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


def check_output_folder(folder: Path) -> None:
    """Make sure that `folder` exists and can be written; else a `UserError`."""
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: is a link to {os.readlink(folder)}, which is not there; make that")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder to write to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None


def clear_way(out: Path, files: Iterable[Path | str], overwrite: bool) -> None:
    """Make sure that a grader will find nothing but these files, paths within `out`, in the folders they go to.

    Other files are removed if `overwrite` says so; else they are a `UserError`, as is an OUT that cannot be written.
    """
    check_output_folder(out)
    wanted = {Path(out) / file for file in files}
    strays = []
    for folder in sorted({file.parent for file in wanted}):
        if not folder.exists():
            continue
        check_output_folder(folder)
        others = sorted(path for path in folder.iterdir() if path not in wanted)
        if others and not overwrite:
            raise UserError(
                f"{folder}: already holds {len(others)} other files ({others[0].name}, ...) that a grader would judge"
                " as well; name an empty folder, or remove them with --overwrite"
            )
        strays += others
    if folders := [stray for stray in strays if stray.is_dir()]:
        raise UserError(f"{folders[0]}: is a folder, which --overwrite does not remove; move it away")
    for stray in strays:
        stray.unlink()


@contextlib.contextmanager
def stage_folder(folder: Path, files: Iterable[Path | str] = ()) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends well, and vanish when it does not.

    A `UserError` if `folder` is a file or cannot be written, or at once if one of `files`, which lie there empty and
    are all to be filled, can have no place in it.
    """
    check_output_folder(folder := Path(folder))
    try:
        with temporary_folder(folder) as stage:
            for file in files:
                try:
                    (stage / file).parent.mkdir(parents=True, exist_ok=True)
                    (stage / file).write_bytes(b"")
                except OSError as error:
                    raise UserError(
                        f"{folder / file}: cannot be written ({error.strerror}); choose another name"
                    ) from None
                check_target(folder / file)
            yield stage
            files = sorted(path for path in stage.rglob("*") if path.is_file())
            targets = [folder / file.relative_to(stage) for file in files]
            for target in targets:
                check_target(target)
            for file, target in zip(files, targets):
                target.parent.mkdir(parents=True, exist_ok=True)
                move_into_place(file, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); free space or choose another folder") from None


def check_target(target: Path) -> None:
    """Raise a `UserError` if a folder has this path, or a file has that of one of its folders."""
    nearest = next(place for place in (target, *target.parents) if place.exists())
    if nearest.is_dir() == (nearest == target):
        kinds = ("folder", "file") if nearest.is_dir() else ("file", "folder")
        raise UserError(f"{nearest}: is a {kinds[0]} where a {kinds[1]} is to go; move it away")


def add_json_argument(parser: Any) -> None:
    """Add `--json FILE`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")


def check_json(path: Path | None) -> None:
    """Raise a `UserError` before anything is measured if the file's folder cannot be written."""
    if path:
        check_output_folder(path.parent)


def write_json(path: Path | None, figures: Any) -> None:
    """Write figures as one JSON document; with no path, do nothing. A `UserError` if the file cannot be written."""
    if path:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(figures, indent=1) + "\n"))

"""What programs leave on disk: files that are whole or not there, folders filled all at once, results as JSON."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.cli import UserError

UNFINISHED = ".unfinished-"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file of the same name in a temporary folder, then move it to `path`, which is always whole.

    A `UserError` if the folder cannot be written or the disk is full; an earlier file at `path` is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder, because safetensors makes temporary files of its own beside the one that it is given.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as stage:
            temporary = Path(stage) / path.name
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


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed while writing left in a folder."""
    for stage in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(stage, ignore_errors=True)


def check_output_folder(folder: Path) -> None:
    """Make sure that `folder` exists and can be written; else a `UserError`."""
    folder = Path(folder)
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
def stage_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends well, and vanish when it does not.

    A `UserError` if `folder` is a file or cannot be written.
    """
    check_output_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED, ignore_cleanup_errors=True) as temporary:
            stage = Path(temporary)
            yield stage
            files = sorted(path for path in stage.rglob("*") if path.is_file())
            targets = [Path(folder) / file.relative_to(stage) for file in files]
            if in_the_way := [target for target in targets if target.is_dir()]:
                raise UserError(f"{in_the_way[0]}: is a folder where a file is to go; move it away")
            for file, target in zip(files, targets):
                target.parent.mkdir(parents=True, exist_ok=True)
                move_into_place(file, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); free space or choose another folder") from None


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

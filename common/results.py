"""Measured figures for other programs: the flag --json of every script that measures something."""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from common.checkpoint import write_atomically
from common.images import check_output_folder


def add_json_argument(parser: ArgumentParser, help: str = "write all figures to this file") -> None:
    """Add `--json FILE`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=help)


def check_json(path: Path | None) -> None:
    """Make sure, before anything is measured, that the file's folder can be written.

    Raises:
        UserError: it cannot.
    """
    if path:
        check_output_folder(path.parent)


def write_json(path: Path | None, figures: Any) -> None:
    """Write figures as one JSON document, if there is a file to write to.

    Raises:
        UserError: the disk is full, or it cannot be written.
    """
    if path:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(figures, indent=1) + "\n"))

"""Hints, prompts and targets listed as JSON Lines, as the course's fill50k does it."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError
from common.files import read_text
from common.images import read_image

Item, Result = TypeVar("Item"), TypeVar("Result")
Field = Literal["source", "target"]
HELD_OUT_EVERY = 11  # odd, because pictures of one disc and of two take turns
FIELDS = ("source", "target", "prompt")
EXAMPLE = '{"source": "0.png", "target": "0.png", "prompt": "red circle with blue background"}'


@dataclass(frozen=True)
class Pair:
    """One line of the table."""

    source: str  # the hint's file name, as it stands in the table
    target: str  # the drawn image's, a path that stays within the folder it is joined to
    prompt: str
    where: str  # "prompt.json line 3", for complaints


def parse_pair(line: str, where: str) -> Pair:
    """The pair that one line of JSON describes.

    A `UserError` if it is no object with the three fields as strings, or its target leaves the folder.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        raise UserError(f"{where}: not JSON ({reason}); write one object a line, such as {EXAMPLE}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not an object but {type(fields).__name__}; write one a line, such as {EXAMPLE}")
    for name in FIELDS:
        value = fields.get(name)
        if name not in fields:
            raise UserError(f'{where}: has no "{name}"; write it like {EXAMPLE}')
        if not isinstance(value, str):
            raise UserError(f'{where}: "{name}" is {json.dumps(value)[:40]}, not a string; put it in quotes')
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f'{where}: "{name}" holds half of a character (\\ud800 to \\udfff); remove it')
        if name != "prompt" and ("\0" in value or not PurePath(value).name):
            raise UserError(f'{where}: "{name}" {value!r} is no file name; write one such as "0.png"')
    target = PurePath(fields["target"])
    if target.is_absolute() or ".." in target.parts:
        raise UserError(f'{where}: "target" {fields["target"]!r} leaves the output folder; write one such as "0.png"')
    return Pair(*(fields[name] for name in FIELDS), where)


def usable(make: Callable[[Item], Result], items: Iterable[Item], keep_going: bool) -> list[Result]:
    """What `make` returns for each item; with `keep_going`, items with a `UserError` are left out with a warning.

    The error is raised only if no item can be used.
    """
    results, complaint = [], None
    for item in items:
        try:
            results.append(make(item))
        except UserError as error:
            if not keep_going:
                raise
            complaint = error
            print(f"skipped: {error}", file=sys.stderr)
    if complaint and not results:
        raise UserError(f"nothing is left: {complaint}")
    return results


def read_pairs(table: Path, keep_going: bool = False, distinct_targets: bool = False) -> list[Pair]:
    """The lines of a table in their order; a byte order mark and blank lines are fine.

    Args:
        table: a text file with a JSON object a line: "source", "target" and "prompt".
        keep_going: see `usable`.
        distinct_targets: refuse a line with the target of an earlier one, whose file it would overwrite.

    A `UserError` if there is no such file, no text, no line in it, or with its number for a line that cannot be used.
    """
    text = read_text(table, f"name one with lines such as {EXAMPLE}")
    # Not splitlines: JSON may hold the further line ends that it knows.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{table}: is empty; add lines such as {EXAMPLE}")
    taken: dict[PurePath, str] = {}

    def parse(numbered: tuple[int, str]) -> Pair:
        number, line = numbered
        pair = parse_pair(line, f"{table} line {number}")
        first = taken.setdefault(PurePath(pair.target), pair.where)
        if distinct_targets and first != pair.where:
            raise UserError(f'{pair.where}: "target" {pair.target!r} is that of {first} too; write another name')
        return pair

    return usable(parse, lines, keep_going)


def read_table(folder: Path) -> list[Pair]:
    """The pairs that `prompt.json` in a folder lists, for training; a `UserError` if too few to hold some out."""
    table = Path(folder) / "prompt.json"
    pairs = read_pairs(table)
    if len(pairs) < HELD_OUT_EVERY:
        raise UserError(f"{table}: lists {len(pairs)} pictures; give at least {HELD_OUT_EVERY}")
    return pairs


def locate(name: str, folder: Path, field: Field) -> Path:
    """Where a file of the table lies; if it is nowhere, the first place where it may lie.

    `source/0.png` is looked for in the data set's folder and in the folder of its hints, `0.png` in the latter.
    """
    path = Path(name)
    places = [folder / path]
    if folder.name != {"source": "target", "target": "source"}[field]:  # a target's namesake there is a hint
        places.append(folder / path.name)
    if len(path.parts) > 1:
        places.append(folder.parent / path)
    return next((place for place in places if place.is_file()), places[0])


def read_pair_image(pair: Pair, folder: Path, size: int | None, field: Field = "source") -> np.ndarray:
    """The hint of one pair, or its target: uint8 (size, size, 3); without a size as large as the file has it.

    A `UserError`, with the table's line, if there is no such file or image.
    """
    path, under = locate(getattr(pair, field), Path(folder), field), "black" if field == "source" else "white"
    return read_image(path, size, f"{pair.where}: ", under=under)


def readable_pairs(pairs: Sequence[Pair], folder: Path, keep_going: bool) -> list[Pair]:
    """The pairs whose hints can be read; see `usable`."""

    def check(pair: Pair) -> Pair:
        read_pair_image(pair, folder, size=None)
        return pair

    return usable(check, pairs, keep_going)


def read_hints(pairs: Sequence[Pair], folder: Path, size: int, field: Field = "source") -> Tensor:
    """The hints of pairs, or their targets, resized: uint8 (N, 3, size, size); errors as `read_pair_image`."""
    images = torch.empty(len(pairs), 3, size, size, dtype=torch.uint8)

    def read(i: int) -> None:
        images[i] = torch.from_numpy(read_pair_image(pairs[i], folder, size, field).copy()).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # decoders let go of Python's lock
        list(pool.map(read, range(len(pairs))))
    return images

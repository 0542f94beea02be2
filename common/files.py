"""What people hand in: text in UTF-8, JSON, the files of a folder, and names with any letters."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.cli import UserError, note

SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")  # beside hidden ones, such as .DS_Store


def read_text(path: Path, mend: str) -> str:
    """The text of a UTF-8 file without its byte order mark; lines end with \\n.

    A `UserError` if there is no such file, or it has another encoding; the line ends with `mend`, or says where.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + len(content) - len(error.object)  # the codec does not count the mark
        line = content.count(b"\n", 0, at) + 1
        raise UserError(f"{path}: not UTF-8 text (byte {at}, in line {line}); save it as UTF-8") from None
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}; {mend}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, mend: str) -> Any:
    """What a JSON file holds; a `UserError` as `read_text`, or if it is no JSON."""
    try:
        value = json.loads(text := read_text(path, mend))
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # no tokenizer takes half of a character (\ud800)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {mend}") from None
    return value


def list_files(folder: Path, suffixes: Collection[str], kind: str, below: bool = False) -> list[Path]:
    """The files of a folder, and of those below it if `below`, with one of these suffixes, in the order of their paths.

    Capitals are fine, and links are followed. Hidden files, those of systems and .txt are passed over; a line on stderr
    tells what else is left out. A `UserError` if there is no such folder or file; its line calls the files `kind`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with {kind}")
    found, others, seen = [], [], set()

    def fail(error: OSError):
        raise error

    def is_ours(name: str) -> bool:
        return not name.startswith(".") and name.lower() not in SYSTEM_FILES

    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(filter(is_ours, folders)) if below and real not in seen else []
        for path in (Path(place, name) for name in filter(is_ours, names) if real not in seen):
            if path.suffix.lower() in suffixes and (path.is_file() or not path.exists()):
                found.append(path)
            elif path.suffix.lower() != ".txt":
                others.append(str(path.relative_to(folder)))
        seen.add(real)  # a link may lead back
    if not found:
        other = f", only files such as {min(others)}" if others else ""
        raise UserError(f"{folder}: holds no {kind}{other}; name another folder")
    if others:
        count = f"{len(others)} files are" if len(others) > 1 else "1 file is"
        note(str(folder), f"{folder}: {count} left out, such as {min(others)}: no {kind} by the name")
    return sorted(found, key=str)


def printable(text: str) -> str:
    """The text on one line, with escapes such as \\n and \\udcff for what has no glyph."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

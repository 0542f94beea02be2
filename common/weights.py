"""Weights files, opened by what they contain: safetensors or torch.save's, this project's or another program's.

Only tensors and plain Python values are read. Whatever else a pickle asks for is passed over, and none of it runs.
"""

import contextlib
import functools
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.cli import UserError, say

Value = TypeVar("Value")
say_once = functools.cache(say)  # a file is opened more than once
# Where programs put the state dict of what they trained; the first that is there is taken.
STATE_DICTS = ("state_dict", "model", "model_state_dict", "controlnet_state_dict", "ema", "params")
# Before any part of a name: DistributedDataParallel's, DataParallel's and torch.compile's.
WRAPPER = re.compile(r"(?<![^.])(module|_orig_mod)\.")
AT_ONCE = 2**26  # numbers that are read before the file is opened anew, which gives its pages back
# What no training leaves behind. It would not run either, but a file that asks for it is not worth reading.
HARMFUL = re.compile(
    r"(builtins\.(eval|exec|compile|open|input|breakpoint|__import__)$)"
    r"|(os|posix|nt|sys|subprocess|shutil|socket|importlib|runpy|pty|ctypes|webbrowser|code|pickle|marshal)\."
)
# How files begin that are downloaded in place of weights.
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; fetch them with: git lfs pull",
    b"<!doctype": "a web page, not weights; download the file itself",
    b"<html": "a web page, not weights; download the file itself",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89hdf": "an HDF5 file, such as Keras writes; save the weights with torch.save",
    b"\x93numpy": "a NumPy file; save a tensor with torch.save",
    b"gguf": "a GGUF file; name one in .safetensors or .ckpt",
}


class LikeDict(type):
    """A class that passes for dict with torch's reader, which sets items of a dict alone."""

    __hash__ = type.__hash__

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict


class Leftover(list, metaclass=LikeDict):
    """Stands where a pickle has another program's object: takes anything, keeps attributes and items, does nothing."""

    __hash__ = object.__hash__

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setitem__(self, name: Any, value: Any) -> None:
        vars(self)[name] = value

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, Mapping) else {})


def items_of(content: Any) -> Mapping[Any, Any]:
    """What a dictionary, or another program's object, holds by name; nothing for anything else."""
    content = vars(content) if isinstance(content, Leftover) else content
    return content if isinstance(content, Mapping) else {}


def is_safetensors(path: Path) -> bool:
    """Whether a weights file is safetensors by its first bytes, or by its name where these do not tell.

    A `UserError` if it is missing or of another kind, such as a web page; the line says which.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the weights file in it")
    if not path.exists():
        raise UserError(f"{path}: no such weights file; check the path, or restore it with git")
    with path.open("rb") as file:
        head = file.read(80)
    if head[4:9] == b"\0\0\0\0{" or head.startswith((b"PK\3\4", b"\x80")):
        return head[8:9] == b"{"
    for start, what in OTHERS.items():
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(start):
            raise UserError(f"{path}: is {what}")
    if head and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        raise UserError(f"{path}: is a text file that begins with {head[:40].decode()!r}, not weights; fetch it again")
    return path.suffix.lower() == ".safetensors"


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; a `UserError` if it is truncated."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); restore it, or remove it") from None


def read_about(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The facts that this project saves in a safetensors file's metadata; empty for other programs' metadata."""
    try:
        about = json.loads((metadata or {}).get("about", "{}"))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def check_zip(path: Path) -> bool:
    """Whether a file of torch.save is a zip, as since torch 1.6; a `UserError` if it is another zip, or truncated."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise UserError(f"{path}: truncated (its table of contents is missing); fetch it again")
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(f"{path}: is a TorchScript archive, which has code; save model.state_dict() with torch.save")
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path}: is a zip archive of other files ({', '.join(names[:3])}); unpack it first")
    return True


def load_pt(path: Path) -> Any:
    """What a program saved with `torch.save`, on the CPU; a `Leftover` stands for what is no tensor or plain value.

    Weights in the zip format stay on disk until they are used. A `UserError` if the file is truncated, no file of
    torch.save, or asks for what only harmful files ask for.
    """
    mapped = check_zip(path) and path.suffix != ".safetensors"  # by whose name torch would choose another reader
    # `getattr` is how pickles name nested classes and members of enumerations.
    stand_ins = {"Leftover": Leftover, "builtins.getattr": lambda *_: Leftover}
    while True:
        pairs = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with (
                warnings.catch_warnings(action="ignore"),
                torch.serialization.safe_globals(pairs),
                path.open("rb") as f,
            ):
                return torch.load(path if mapped else f, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", reason := str(error))
            name = wanted and (wanted[1] if "." in wanted[1] else f"builtins.{wanted[1]}")
            if wanted and not HARMFUL.match(name) and name not in stand_ins:
                stand_ins[name] = LikeDict(name, (Leftover,), {})
                continue
        except Exception as error:  # bytes that are no pickle make the reader stumble in any way: EOFError, KeyError
            reason, wanted = str(error) if len(str(error)) > 3 else type(error).__name__, None
        if wanted:
            what = f"it asks for {wanted[1]}, which could run code, so it was not read; save plain tensors"
        elif "persistent" in reason:
            what = "holds a whole pickled model; save model.state_dict() with torch.save"
        elif "subclass" in reason:
            what = "holds a tensor of a class of its own; save it as a plain tensor"
        elif "operand" in reason or "magic number" in reason:
            what = "is a pickle that torch.save did not write by default; save it again with torch.save(state, path)"
        else:
            reason = reason.partition(". ")[0][:200]
            what = f"truncated, or not a file of torch.save ({reason}); fetch it again"
        raise UserError(f"{path}: {what}")


def load_content(path: Path) -> Any:
    """All that a weights file holds, whatever its format; of a safetensors file its tensors by name.

    A `UserError` if the file is missing, truncated, harmful, or of another kind.
    """
    path = Path(path)
    if not is_safetensors(path):
        return load_pt(path)
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def strip_wrappers(state: Mapping[str, Value]) -> Mapping[str, Value]:
    """The state without what DistributedDataParallel and torch.compile put into names, unless two would be the same."""
    state = {name: value for name, value in state.items() if name != "n_averaged"}  # torch.optim.swa_utils' count
    stripped = {WRAPPER.sub("", name): value for name, value in state.items()}
    return stripped if len(stripped) == len(state) else state


def describe_content(content: Any) -> str:
    """What a pickle without named tensors holds, in words."""
    held = items_of(content)
    for name, value in [(type(content).__name__, content), *held.items()]:
        if "_modules" in items_of(value):
            return f"a whole pickled model ({name if value is content else f'{name}: {type(value).__name__}'})"
    if "shadow_params" in held:
        return "EMA weights without their names"
    if held:
        return f"only {', '.join(map(str, [*held][:5]))}"
    return f"one tensor of {tuple(content.shape)}" if isinstance(content, Tensor) else f"a {type(content).__name__}"


def find_state(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The named tensors in what was read from a file: bare, or one level down, under whatever name.

    A `UserError` if there are none; the line says what there is.
    """
    held = items_of(content)
    levels = {"": content} | ({} if "_modules" in held else dict(held))
    levels = {
        key: {name: t for name, t in items_of(level).items() if isinstance(name, str) and isinstance(t, Tensor)}
        for key, level in levels.items()
    }
    known = [key for key in STATE_DICTS if levels.get(key)]
    chosen = known[0] if known else max(levels, key=lambda key: len(levels[key]))
    if not levels[chosen]:
        what = describe_content(content)
        raise UserError(f"{path}: holds no named tensors but {what}; save model.state_dict() with torch.save")
    if bare := [name for name, tensor in levels[chosen].items() if tensor.is_meta]:
        raise UserError(f"{path}: {bare[0]} has a shape but no numbers (a meta tensor); save the trained model")
    if others := [key for key in levels if key != chosen and len(levels[key]) == len(levels[chosen]) > 1]:
        say_once(f"{path}: taking the weights under {chosen!r}, not those under {', '.join(map(repr, others))}")
    return strip_wrappers(levels[chosen])


@dataclass(frozen=True)
class WeightsFile:
    """A weights file, still on disk."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # by the tensors' names, without what wrappers add, in the file's order
    about: Mapping[str, Any] = field(default_factory=dict)  # facts that this project saved; empty for others' files

    def read(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, in the file's order; each stays on disk until it is copied."""
        left = [name for name in self.shapes if name in names]
        while left:
            count = 1 + sum(numbers < AT_ONCE for numbers in accumulate(prod(self.shapes[name]) for name in left))
            part, left = left[:count], left[count:]
            if is_safetensors(self.path):
                with open_safetensors(self.path) as file:
                    stored = strip_wrappers({name: name for name in file.keys()})
                    yield from ((name, file.get_tensor(stored[name])) for name in part)
            else:
                state = find_state(load_pt(self.path), self.path)
                yield from ((name, state[name]) for name in part)


def open_weights(path: Path) -> WeightsFile:
    """The names and shapes in a weights file, and the facts that this project saved with them.

    A `UserError` if the file is missing, truncated, harmful, of another kind, or without named tensors.
    """
    path = Path(path)
    if not is_safetensors(path):
        state = find_state(load_pt(path), path)
        return WeightsFile(path, {name: tuple(tensor.shape) for name, tensor in state.items()})
    with open_safetensors(path) as file:
        stored = strip_wrappers({name: name for name in file.offset_keys()})
        shapes = {name: tuple(file.get_slice(own).get_shape()) for name, own in stored.items()}
        return WeightsFile(path, shapes, read_about(file.metadata()))

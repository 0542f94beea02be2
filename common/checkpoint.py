"""Weights on disk: safetensors that carry their model's config, written atomically and read with clear complaints."""

import contextlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.cli import UserError
from common.output import write_atomically

EMA_PREFIX = "ema."
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
ZIP_START = b"PK\x03\x04"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able facts about them as one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors keeps strings only; one JSON value under one key also keeps the order and the numbers' types.
    metadata = {"about": json.dumps(about)}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        UserError: the file is missing, truncated, or no safetensors file.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the weights file in it")
    if not path.exists():
        raise UserError(f"{path}: no such weights file; check the path, or restore it with git")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); restore it, or remove it") from None


def load_about(path: Path) -> dict[str, Any]:
    """The facts saved with the tensors of a safetensors file; empty for another program's file."""
    with open_safetensors(Path(path)) as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def load_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A safetensors file's tensors, only those under `prefix`, which is cut off, and the facts saved with them."""
    about = load_about(path)
    with open_safetensors(Path(path)) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}, about


def load_model_file(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights for sampling and the facts to rebuild their model: a finished model, or the EMA part of a training state.

    `kind` is the class name that the file must carry among its facts.

    Raises:
        UserError: as `open_safetensors`, or the file belongs to another model.
    """
    found = (about := load_about(path)).get("kind", "weights without a config")
    if found != kind:
        raise UserError(f"{path}: holds {found}, not a {kind}; name another file")
    averaged, _ = load_tensors(path, EMA_PREFIX)
    return averaged or load_tensors(path)[0], about


class Leftover:
    """Stands where a pickle has another program's object that nobody asks for: takes anything and does nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, _):
        pass


def load_pt(path: Path, leftovers: Sequence[str] = ()) -> Any:
    """What another program saved with `torch.save`: tensors, and plain containers of them, on the CPU.

    Only tensors and plain Python values are read: a pickle that asks for anything else is refused, and none of its code
    runs. Where it asks for one of the `leftovers`, full names of classes and functions, it gets a `Leftover` instead.
    Weights in the zip format stay on disk until they are used.

    Raises:
        UserError: the file is missing, truncated, no such file at all, or asks for more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    whole_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not whole_zip and file.read(len(ZIP_START)) == ZIP_START:
            raise UserError(f"{path}: truncated (its table of contents is missing); fetch it again")
    stand_ins = [(Leftover, name) for name in leftovers]
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=whole_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it asks for {wanted[1]})" if wanted else ""
        raise UserError(
            f"{path}: holds more than plain tensors, or is no file of torch.save{what}; it was not read, since it could"
            " run code; save plain tensors with torch.save"
        ) from None
    except Exception as error:  # bytes that are no pickle make the reader stumble in any way: EOFError, KeyError, ...
        reason = str(error).partition(". ")[0] if len(str(error)) > 3 else type(error).__name__
        raise UserError(f"{path}: truncated, or not a file of torch.save ({reason}); fetch it again") from None


def strip_wrappers(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state without the prefixes that DistributedDataParallel and torch.compile put before every name."""
    for prefix in WRAPPER_PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return strip_wrappers({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the state into the model; every key and shape must fit.

    The prefixes that DistributedDataParallel and torch.compile add are taken off first.

    Raises:
        UserError: names how many keys are missing, unexpected or of another shape, and a few of each.
    """
    state = strip_wrappers(state)
    expected = model.state_dict()
    misfits = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    complaints = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in misfits.items() if names]
    if complaints:
        raise UserError(f"{source}: does not fit {type(model).__name__}: {'; '.join(complaints)}; name another file")
    model.load_state_dict(state)


def to_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with its floating-point tensors in fp16, as weights are shipped."""
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def start_from(model: nn.Module, weights: Path, about: Mapping[str, Any]) -> None:
    """Load weights for training to go on from.

    Raises:
        UserError: they do not fit, or were trained for another schedule or prediction than `about` says.
    """
    state, theirs = load_model_file(weights, about["kind"])
    for name in ("schedule", "prediction"):
        if theirs[name] != about[name]:
            raise UserError(f"--init {weights}: its {name} is {theirs[name]}, not {about[name]}; change the flags")
    load_strictly(model, state, str(weights))

"""Weights on disk: safetensors that carry their model's config, written atomically; other people's files read safely."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError

EMA_PREFIX = "ema."
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it, so that `path` is always whole.

    Raises:
        UserError: the folder cannot be written or the disk is full; an earlier file at `path` is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); free space or choose another folder") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able facts about them as one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors keeps strings only; one JSON value under one key also keeps the order and the numbers' types.
    metadata = {"about": json.dumps(about)}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def load_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors (only those under `prefix`, which is cut off) and the facts saved with them.

    Raises:
        UserError: the file is missing, truncated, or no safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the weights file in it")
    if not path.exists():
        raise UserError(f"{path}: no such weights file; check the path, or restore it with git")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            names = [name for name in file.keys() if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}, about
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def load_model_file(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights for sampling and the facts to rebuild their model: a finished model, or the EMA part of a training state.

    Args:
        path: safetensors file written by `save_tensors`, with at least `kind` and `config` among its facts.
        kind: the class name that the file must carry.

    Raises:
        UserError: as `load_tensors`, or the file belongs to another model.
    """
    state, about = load_tensors(path)
    if about.get("kind") != kind:
        raise UserError(
            f"{path}: holds {about.get('kind', 'weights without a config')}, not a {kind}; name another file"
        )
    if any(name.startswith(EMA_PREFIX) for name in state):
        state = {name.removeprefix(EMA_PREFIX): t for name, t in state.items() if name.startswith(EMA_PREFIX)}
    return state, about


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the state into the model; every key and shape must fit.

    The prefixes that DistributedDataParallel and torch.compile add are taken off first.

    Raises:
        UserError: names how many keys are missing, unexpected or of another shape, and a few of each.
    """
    for prefix in WRAPPER_PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
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


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with its floating-point tensors in fp16, as weights are shipped."""
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}

"""Weights on disk: safetensors that carry their model's config, written atomically and read with clear complaints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.cli import UserError
from common.output import write_atomically
from common.weights import open_weights, strip_wrappers

EMA_PREFIX = "ema."


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able facts about them as one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors keeps strings only; one JSON value under one key also keeps the order and the numbers' types.
    metadata = {"about": json.dumps(about)}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def load_about(path: Path) -> dict[str, Any]:
    """The facts saved with the tensors of a weights file; empty for another program's. Errors as `open_weights`."""
    return dict(open_weights(path).about)


def load_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A weights file's tensors (those under `prefix`, which is cut off) and its facts; errors as `open_weights`."""
    file = open_weights(path)
    names = {name for name in file.shapes if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in file.read(names)}, dict(file.about)


def load_model_file(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights for sampling and the facts to rebuild their model: a finished model, or the EMA part of a training state.

    A `UserError` as `open_weights`, or if the file's facts do not name the class `kind`.
    """
    about = load_about(path)
    if (found := about.get("kind", "weights without a config")) != kind:
        raise UserError(f"{path}: holds {found}, not a {kind}; name another file")
    if "config" not in about:
        raise UserError(f"{path}: does not say its config; save it with train.py")
    averaged, _ = load_tensors(path, EMA_PREFIX)
    return averaged or load_tensors(path)[0], about


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the state into the model, without the prefixes that wrappers add to names; every key and shape must fit.

    Else a `UserError` says how many keys are missing, unexpected or of another shape, and names a few of each.
    """
    state, expected = strip_wrappers(state), model.state_dict()
    lead = next(iter(state), "").partition(".")[0] + "."  # such as Lightning's `model.`
    if not expected.keys() & state.keys() and all(name.startswith(lead) for name in state):
        state = {name.removeprefix(lead): tensor for name, tensor in state.items()}
    misfits = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "of another type": [
            f"{name} {state[name].dtype}, {state[name].layout}"
            for name, tensor in expected.items()
            if name in state
            and (state[name].is_floating_point() != tensor.is_floating_point() or state[name].layout != tensor.layout)
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
    """Load weights to train on; a `UserError` unless they fit, with the schedule and prediction that `about` says."""
    state, theirs = load_model_file(weights, about["kind"])
    for name in ("schedule", "prediction"):
        if theirs[name] != about[name]:
            raise UserError(f"--init {weights}: its {name} is {theirs[name]}, not {about[name]}; change the flags")
    load_strictly(model, state, str(weights))


def hash_weights(model: nn.Module, *facts: object) -> str:
    """A hash of a model's weights and of further facts."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

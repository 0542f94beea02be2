"""A file of weights by other programs: what it holds is told from names and shapes before anything is loaded."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_about, load_pt, opened
from common.cli import UserError

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
CONTROL = "control_model."
# What training left in the published files beside the weights. Nothing else is unpickled but tensors.
LEFTOVERS = (
    *(
        f"{package}.callbacks.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
        )
    ),
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
# The first that some name of a file starts with says what the file is.
KINDS = {
    r"(lora_|.*\.lora_)": "a LoRA",
    rf"({re.escape(CONTROL)})?(zero_convs|input_hint_block|controlnet_\w+)\.": "a ControlNet",
    r"conditioner\.": "Stable Diffusion XL",
    r"model\.diffusion_model\.joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"cond_stage_model\.model\.": "Stable Diffusion v2",
    re.escape(UNET): "Stable Diffusion v1",
    r"(down_blocks|up_blocks|mid_block|conv_in)\.": "one model of a diffusers folder",
    rf"({re.escape(VAE)})?(encoder|decoder)\.": "a VAE",
}
AT_ONCE = 2**26  # numbers that are read before the file is opened anew, which gives its pages back


@dataclass(frozen=True)
class WeightsFile:
    """A weights file, still on disk.

    Attributes:
        path: of the file.
        shapes: of its tensors by their names, in the file's order.
        about: facts that this project saved with them; empty for others' files.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, in the file's order; each stays on disk until it is copied."""
        group, numbers, names = [], 0, set(names)
        for name, shape in self.shapes.items():
            if name in names:
                group.append(name)
                numbers += torch.Size(shape).numel()
            if numbers >= AT_ONCE:
                yield from self.read_at_once(group)
                group, numbers = [], 0
        yield from self.read_at_once(group)

    def read_at_once(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names from one opening of the file."""
        if is_safetensors(self.path):
            with opened(self.path) as file:
                yield from ((name, file.get_tensor(name)) for name in names)
        else:
            state = unpickled(self.path)
            yield from ((name, state[name]) for name in names)


def is_safetensors(path: Path) -> bool:
    """Whether a file is one by its name or its first bytes."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def unpickled(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.ckpt`, bare or under `state_dict`; they stay on disk until they are used.

    Raises:
        UserError: it is truncated, no file of torch.save, without tensors, or asks for anything that could run code.
    """
    content = load_pt(path, LEFTOVERS)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = content.items() if isinstance(content, Mapping) else ()
    state = {name: tensor for name, tensor in tensors if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no named tensors; name a model's weights file")
    return state


def open_weights(path: Path) -> WeightsFile:
    """The names and shapes in a `.safetensors` or `.ckpt`.

    Raises:
        UserError: the file is missing, truncated, or neither; or it asks for anything that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.exists() else 'no such file'}; name a weights file")
    if not is_safetensors(path):
        return WeightsFile(path, {name: tuple(tensor.shape) for name, tensor in unpickled(path).items()}, {})
    with opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    return WeightsFile(path, shapes, load_about(path))


def described(file: WeightsFile) -> str:
    """What the file is, in words."""
    if kind := file.about.get("kind"):
        return f"a {kind} of this project"
    kinds = (kind for pattern, kind in KINDS.items() if any(re.match(pattern, name) for name in file.shapes))
    kind = next(kinds, f"no model that is known here (its first weight is {next(iter(file.shapes), None)})")
    if kind == "Stable Diffusion v1":
        if file.shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1] == 1024:
            return "Stable Diffusion v2"
        if file.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1] != 4:
            return "Stable Diffusion v1 for inpainting"
    return kind

"""Stable Diffusion v1 from the single file that it was published as, and ControlNets from theirs; without network.

    file --open_weights--> names and shapes --find_weights--> one model's, as diffusers names them --fill--> the model

diffusers' own conversion tells the names. It runs on shapes alone: on tensors it would hold all of the file in memory,
beside the model. Here one tensor at a time comes into memory, at once in the dtype and on the device that are wanted.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from common.checkpoint import load_about, load_pt, load_strictly, open_safetensors, save_tensors
from common.cli import UserError, say

SD_V1 = Path(__file__).resolve().parent / "v1"  # a pipeline folder without weights
PUBLISHED = SD_V1 / "published_weights.json"  # names and shapes in the published files
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
CONTROL = "control_model."
# Not needed for drawing: the VAE's discriminator, and positions, which are 0, 1, 2, ...
IDLE = r"loss\.|(text_model\.)?embeddings\.position_ids$"
# What training left in the published files beside the weights. Nothing else is unpickled but tensors.
CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor")
LEFTOVERS = (
    *(f"{package}.callbacks.{name}" for package in ("pytorch_lightning", "lightning.pytorch") for name in CALLBACKS),
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
# The first pattern that some name in a file begins with says what the file is.
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
    """A weights file, still on disk."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors by their names, in the file's order
    about: Mapping[str, Any] = field(default_factory=dict)  # what this project saved with them; empty for others' files

    def read(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, in the file's order; each stays on disk until it is copied."""
        left = [name for name in self.shapes if name in names]
        while left:
            count = 1 + sum(numbers < AT_ONCE for numbers in accumulate(prod(self.shapes[name]) for name in left))
            part, left = left[:count], left[count:]
            if is_safetensors(self.path):
                with open_safetensors(self.path) as file:
                    yield from ((name, file.get_tensor(name)) for name in part)
            else:
                state = load_ckpt(self.path)
                yield from ((name, state[name]) for name in part)

    def describe(self) -> str:
        """What the file is, in words."""
        if kind := self.about.get("kind"):
            return f"a {kind} of this project"
        kinds = (kind for pattern, kind in KINDS.items() if any(re.match(pattern, name) for name in self.shapes))
        kind = next(kinds, f"no model that is known here (its first weight is {next(iter(self.shapes), None)})")
        if kind == "Stable Diffusion v1":
            if self.shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1] == 1024:
                return "Stable Diffusion v2"
            if self.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1] != 4:
                return "Stable Diffusion v1 for inpainting"
        return kind

    def locate(self, prefix: str) -> dict[str, str]:
        """Where the file has the weights whose original names start with the prefix, by these names.

        A U-Net's EMA weights are taken where the file has them: `model_ema.*`, whose names have lost their dots.
        """
        own = {n: n for n in self.shapes if n.startswith(prefix) and not re.match(IDLE, n.removeprefix(prefix))}
        averaged = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in own}
        return averaged if prefix == UNET and all(name in self.shapes for name in averaged.values()) else own


@dataclass(frozen=True)
class ModelWeights:
    """One model's weights in a file."""

    file: WeightsFile
    stored: Mapping[str, str]  # their names in the file by their names in the model
    shapes: Mapping[str, Tensor]  # tensors on the meta device by their names in the model

    def sizes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Sizes for a config, each the last dimension of a weight; a name with {} gives one for every level.

        Raises:
            UserError: the file has no such weight.
        """
        sizes = {}
        for size, name in names.items():
            levels = dict.fromkeys(name.format(level) for level in range(10))
            weights = [self.shapes[level] for level in levels if level in self.shapes]
            found = [weight.shape[-1] for weight in weights if weight.ndim]
            if not found:
                kind = self.file.describe()
                raise UserError(f"{self.file.path}: is {kind} but lacks {name.format(0)}; name a whole file")
            sizes[size] = found if "{}" in name else found[0]
        return sizes

    def fill(
        self, model: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """Give a model on the meta device its weights, and return it in eval mode.

        Raises:
            UserError: the weights are not just the model's; names a few that are missing, too many or of another shape.
        """
        load_strictly(model, self.shapes, str(self.file.path))
        names, state = {stored: name for name, stored in self.stored.items()}, {}
        for stored, tensor in self.file.read(names):
            tensor = tensor.reshape(self.shapes[names[stored]].shape)
            layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            state[names[stored]] = tensor.to(device, dtype, copy=True, memory_format=layout)
        model.load_state_dict(state, assign=True)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:  # the text encoder's positions, which are not saved
                    module.register_buffer(name, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)
        return model.eval()


def is_safetensors(path: Path) -> bool:
    """Whether a file is one by its name or its first bytes."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def load_ckpt(path: Path) -> dict[str, Tensor]:
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
        return WeightsFile(path, {name: tuple(tensor.shape) for name, tensor in load_ckpt(path).items()})
    with open_safetensors(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    return WeightsFile(path, shapes, load_about(path))


def find_weights(file: WeightsFile, prefix: str, convert: Callable[..., dict[str, Tensor]]) -> ModelWeights:
    """One model's weights in a file in the original layout.

    Their original names start with the prefix; `convert` is diffusers' function that converts such a model's state.
    Those that it leaves out keep their names, so that they are complained about.
    """
    stored = file.locate(prefix)
    state = {name: torch.empty(file.shapes[own], device="meta") for name, own in stored.items()}
    originals = {id(tensor): name for name, tensor in state.items()}
    config = read_config("vae" if prefix == VAE else "unet")
    shapes = {name: tensor for name, tensor in convert(state, config=config).items() if tensor is not None}
    # Where attention was done by convolutions, the conversion takes a view of them.
    names = {name: originals[id(t if t._base is None else t._base)] for name, t in shapes.items()}
    for original in stored.keys() - names.values():
        names[original.removeprefix(prefix)] = original
        shapes[original.removeprefix(prefix)] = state[original]
    return ModelWeights(file, {name: stored[original] for name, original in names.items()}, shapes)


def convert_text_encoder(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """As diffusers converts the other models; its own conversion keeps `text_model.`, which transformers dropped."""
    return {name.removeprefix(TEXT).removeprefix("text_model."): tensor for name, tensor in state.items()}


def read_config(part: str) -> dict[str, Any]:
    """Stable Diffusion v1's config of one model."""
    return json.loads((SD_V1 / part / "config.json").read_text())


ATTENDED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
UNET_SIZES = {"block_out_channels": "down_blocks.{}.resnets.0.conv2.bias", "cross_attention_dim": ATTENDED}
VAE_SIZES = {"block_out_channels": "encoder.down_blocks.{}.resnets.0.conv2.bias"}
TEXT_SIZES = {"hidden_size": "final_layer_norm.bias", "intermediate_size": "encoder.layers.0.mlp.fc1.bias"}
PARTS = {
    "unet": (UNET, convert_ldm_unet_checkpoint, UNET_SIZES, UNet2DConditionModel.from_config),
    "vae": (VAE, convert_ldm_vae_checkpoint, VAE_SIZES, AutoencoderKL.from_config),
    "text_encoder": (TEXT, convert_text_encoder, TEXT_SIZES, lambda sizes: CLIPTextModel(CLIPTextConfig(**sizes))),
}


def make_models(file: WeightsFile) -> dict[str, nn.Module]:
    """The U-Net, VAE and text encoder of the file's sizes, on the meta device.

    Raises:
        UserError: the file is no whole Stable Diffusion v1; the line says what it is.
    """
    if (found := file.describe()) != "Stable Diffusion v1":
        mend = "give it as --controlnet" if found == "a ControlNet" else "name a file such as sd-v1-4.ckpt"
        raise UserError(f"{file.path}: is {found}, not Stable Diffusion v1; {mend}")
    models = {}
    for part, (prefix, convert, sizes, make) in PARTS.items():
        weights = find_weights(file, prefix, convert)
        config = read_config(part) | weights.sizes(sizes)
        with torch.device("meta"):
            models[part] = make(config)
        load_strictly(models[part], weights.shapes, str(file.path))
    return models


def read_stable_diffusion(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, cache: Path | None = None
) -> dict[str, nn.Module]:
    """The U-Net, VAE and text encoder in a single file of Stable Diffusion v1, in the original layout.

    Args:
        path: a `.safetensors`, or a `.ckpt`, of which no code runs.
        device, dtype: of the weights in memory, whatever they are in the file.
        cache: folder for safetensors made of `.ckpt` files, under their names, sizes and times; None makes none.

    Raises:
        UserError: the file is missing, truncated, harmful or another model's; the line says what it is.
    """
    path, copy = Path(path), None
    if cache is not None and path.is_file() and not is_safetensors(path):
        status = path.stat()
        copy = Path(cache) / f"{path.stem}-{status.st_size:x}-{status.st_mtime_ns:x}.safetensors"
    known = copy is not None and copy.exists()
    file = open_weights(copy if known else path)
    models = make_models(file)
    if copy is not None and not known:
        file = convert_file(file, copy)
    for part, (prefix, convert, *_) in PARTS.items():
        find_weights(file, prefix, convert).fill(models[part], device, dtype).requires_grad_(False)
    return models


def cache_folder() -> Path:
    """Where converted files are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dlcv-hw2"


def convert_file(file: WeightsFile, copy: Path) -> WeightsFile:
    """Write a `.ckpt`'s weights as safetensors under their original names; returns the copy, or if need be the file."""
    say(f"{file.path}: keeping a copy that is read sooner, {copy}")
    state, tensors = load_ckpt(file.path), {}
    for prefix, *_ in PARTS.values():
        tensors |= {name: state[own] for name, own in file.locate(prefix).items()}
    try:
        save_tensors(copy, tensors, {"source": file.path.name})
    except UserError as error:
        print(f"warning: {error}; going on without a converted copy, which would be read sooner", file=sys.stderr)
        return file
    return open_weights(copy)


def find_controlnet(file: WeightsFile) -> ModelWeights:
    """A ControlNet's weights in a file, which may have the original names or diffusers' own.

    Raises:
        UserError: the file holds no ControlNet; the line says what it is.
    """
    if (found := file.describe()) != "a ControlNet":
        raise UserError(f"{file.path}: is {found}, not a ControlNet; name another file")
    if any(name.startswith("controlnet_") for name in file.shapes):
        shapes = {name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()}
        return ModelWeights(file, {name: name for name in shapes}, shapes)
    prefix = CONTROL if any(name.startswith(CONTROL) for name in file.shapes) else ""
    return find_weights(file, prefix, convert_controlnet_checkpoint)


def controlnet_sizes(weights: ModelWeights) -> dict[str, Any]:
    """What the shapes say of a ControlNet's config; the rest is Stable Diffusion v1's.

    Raises:
        UserError: the file lacks weights that would tell.
    """
    sizes = weights.sizes(UNET_SIZES | {"hint": "controlnet_cond_embedding.blocks.{}.bias"})
    first, *widths = sizes.pop("hint")
    return sizes | {"conditioning_embedding_out_channels": [first, *widths[::2]]}


def original_controlnet_names() -> Mapping[str, str]:
    """The names in the published ControlNet's file, by diffusers' names."""
    return find_controlnet(WeightsFile(PUBLISHED, json.loads(PUBLISHED.read_text())["controlnet"])).stored

"""Stable Diffusion v1 from the single file that it was published as, and ControlNets from theirs; without network.

    file --open_weights--> names and shapes --find_weights--> one model's, as diffusers names them --fill--> the model

diffusers' own conversion tells the names. It runs on shapes alone: on tensors it would hold all of the file in memory,
beside the model. Here one tensor at a time comes into memory, at once in the dtype and on the device that are wanted.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

from common.checkpoint import load_strictly, save_tensors
from common.cli import UserError, say
from common.weights import WeightsFile, is_safetensors, open_weights

SD_V1 = Path(__file__).resolve().parent / "v1"  # a pipeline folder without weights
PUBLISHED = SD_V1 / "published_weights.json"  # names and shapes in the published files
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
CONTROL = "control_model."
# Not needed for drawing: the VAE's discriminator, what CLIP compares pictures with, and positions, which are 0, 1, 2...
IDLE = re.compile(r"loss\.|text_projection|(text_model\.)?embeddings\.position_ids$|.*lora_")
# The first pattern that some name in a file begins with says what the file is.
CONTROLNET = rf"({re.escape(CONTROL)})?(zero_convs|input_hint_block|controlnet_\w+)\."
KINDS = {
    r"conditioner\.": "Stable Diffusion XL",
    r"model\.diffusion_model\.joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"cond_stage_model\.model\.": "Stable Diffusion v2",
    rf"{re.escape(UNET)}(?!.*lora_)": "Stable Diffusion v1",
    CONTROLNET: "a ControlNet",
    r"lora_|.*\.lora_": "a LoRA",
    r"model_ema\.": "EMA weights alone",
    r"(down_blocks|up_blocks|mid_block|conv_in)\.": "one model of a diffusers folder",
    rf"({re.escape(VAE)})?(encoder|decoder)\.": "a VAE",
}


def describe(file: WeightsFile) -> str:
    """What the file is, in words."""
    if kind := file.about.get("kind"):
        return f"a {kind} of this project"
    kinds = (kind for pattern, kind in KINDS.items() if any(re.match(pattern, name) for name in file.shapes))
    kind = next(kinds, f"no model that is known here (its first weight is {next(iter(file.shapes), None)})")
    if kind == "Stable Diffusion v1":
        if file.shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())[1:2] == (1024,):
            return "Stable Diffusion v2"
        if file.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1:2] != (4,):
            return "Stable Diffusion v1 for inpainting"
    return kind


def locate(file: WeightsFile, prefix: str) -> dict[str, str]:
    """Where the file has the weights whose original names start with the prefix, by these names.

    A U-Net's EMA weights are taken where the file has them: `model_ema.*`, whose names have lost their dots.
    """
    own = {n: n for n in file.shapes if n.startswith(prefix) and not IDLE.match(n.removeprefix(prefix))}
    averaged = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in own}
    return averaged if prefix == UNET and all(name in file.shapes for name in averaged.values()) else own


@dataclass(frozen=True)
class ModelWeights:
    """One model's weights in a file."""

    file: WeightsFile
    stored: Mapping[str, str]  # their names in the file by their names in the model
    shapes: Mapping[str, Tensor]  # tensors on the meta device by their names in the model

    def sizes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Sizes for a config, each the last dimension of a weight; a name with {} gives one for every level.

        A `UserError` if the file has no such weight.
        """
        sizes = {}
        for size, name in names.items():
            levels = dict.fromkeys(name.format(level) for level in range(10))
            weights = [self.shapes[level] for level in levels if level in self.shapes]
            found = [weight.shape[-1] for weight in weights if weight.ndim]
            if not found:
                kind = describe(self.file)
                raise UserError(f"{self.file.path}: is {kind} but lacks {name.format(0)}; name a whole file")
            sizes[size] = found if "{}" in name else found[0]
        return sizes

    def fill(
        self, model: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """Give a model on the meta device its weights, and return it in eval mode; a `UserError` as `load_strictly`."""
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


def find_folder(path: Path, file: str) -> Path:
    """The folder in diffusers' layout that has a file: this one, or if it is a hub cache's, the newest snapshot in it.

    A `UserError` if there is none; the line says what there is instead.
    """
    places = [path, *sorted(path.glob("snapshots/*"), key=os.path.getmtime, reverse=True)]
    for place in places:
        if (place / file).is_file():
            return place
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise UserError(f"{path}: has no {file}, but {held}; name a whole folder in diffusers' layout, or one file")


def find_file(folder: Path, name: str) -> Path:
    """A model's weights file in a diffusers folder: of this name, or its `.bin`, or a variant such as fp16."""
    files = folder.glob(f"{name.partition('.')[0]}*.*")
    found = [file for file in files if file.suffix in (".safetensors", ".bin")]
    return min(found, key=lambda file: (file.name.count("."), file.suffix != ".safetensors"), default=folder / name)


def find_variant(folder: Path) -> str | None:
    """The variant of a model's weights in a diffusers folder, such as fp16; None if it has the plain ones."""
    names = [path.name.split(".") for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    variants = [name[1] if len(name) == 3 else None for name in sorted(names)]
    return None if None in variants or not variants else variants[0]


def find_weights(file: WeightsFile, prefix: str, convert: Callable[..., dict[str, Tensor]]) -> ModelWeights:
    """One model's weights in a file in the original layout.

    Their original names start with the prefix; `convert` is diffusers' function that converts such a model's state.
    Those that it leaves out keep their names, so that they are complained about.
    """
    stored = locate(file, prefix)
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

    A `UserError` if the file is no whole Stable Diffusion v1; the line says what it is.
    """
    if (found := describe(file)) != "Stable Diffusion v1":
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

    A `UserError` if the file is missing, truncated, harmful or another model's; the line says what it is.
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
    names = {own: name for prefix, *_ in PARTS.values() for name, own in locate(file, prefix).items()}
    try:
        save_tensors(copy, {names[own]: tensor for own, tensor in file.read(names)}, {})
    except UserError as error:
        print(f"warning: {error}; going on without a converted copy, which would be read sooner", file=sys.stderr)
        return file
    return open_weights(copy)


def find_controlnet(file: WeightsFile) -> ModelWeights:
    """A ControlNet's weights in a file, which may have the original names or diffusers' own.

    A `UserError` if the file holds no ControlNet; the line says what it is.
    """
    if not any(re.match(CONTROLNET, name) for name in file.shapes):
        raise UserError(f"{file.path}: is {describe(file)}, not a ControlNet; name another file")
    if any(name.startswith("controlnet_") for name in file.shapes):
        shapes = {name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()}
        return ModelWeights(file, {name: name for name in shapes}, shapes)
    prefix = CONTROL if any(name.startswith(CONTROL) for name in file.shapes) else ""
    return find_weights(file, prefix, convert_controlnet_checkpoint)


def controlnet_sizes(weights: ModelWeights) -> dict[str, Any]:
    """What the shapes say of a ControlNet's config; the rest is Stable Diffusion v1's. Errors as `sizes`."""
    sizes = weights.sizes(UNET_SIZES | {"hint": "controlnet_cond_embedding.blocks.{}.bias"})
    first, *widths = sizes.pop("hint")
    return sizes | {"conditioning_embedding_out_channels": [first, *widths[::2]]}


def count_changes(file: WeightsFile, unet: UNet2DConditionModel) -> int:
    """How many U-Net weights in a file of the original layout differ from a U-Net's by more than rounding."""
    published = WeightsFile(PUBLISHED, json.loads(PUBLISHED.read_text())["sd_v1"])
    names = {stored: name for name, stored in find_weights(published, UNET, convert_ldm_unet_checkpoint).stored.items()}
    state, changed = unet.state_dict(), 0
    for stored, theirs in file.read(names):
        if (ours := state.get(names[stored])) is not None:
            ours, theirs = ours.cpu(), theirs.reshape(ours.shape) if theirs.numel() == ours.numel() else theirs
            eps = 2 * max(torch.finfo(tensor.dtype).eps for tensor in (ours, theirs))
            fits = theirs.shape == ours.shape
            changed += not (fits and torch.allclose(ours.float(), theirs.float(), rtol=eps, atol=eps**2))
    return changed

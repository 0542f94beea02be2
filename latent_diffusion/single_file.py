"""Stable Diffusion v1 from the single file that it was published as, and ControlNets from theirs; without network.

    file --open_weights--> names and shapes --part--> one model's, by their original names --fill--> the model

A file's tensors come into memory one at a time, each at once in the dtype and on the device where it is wanted.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from common.checkpoint import load_strictly, save_tensors
from common.cli import UserError, say
from latent_diffusion.conversion import original_text_names, original_unet_names, original_vae_names
from latent_diffusion.weights_file import (
    CONTROL,
    TEXT,
    UNET,
    VAE,
    WeightsFile,
    described,
    is_safetensors,
    open_weights,
    unpickled,
)

SD_V1 = Path(__file__).resolve().parent / "v1"  # a pipeline folder without weights
AVERAGED = "model_ema."
# Of another use than drawing: the VAE's discriminator, and positions, which are 0, 1, 2, ...
IDLE = r"loss\.|model_ema\.|(text_model\.)?embeddings\.position_ids$"


def part(file: WeightsFile, prefix: str) -> dict[str, str]:
    """Original names of one model's weights, without the prefix, and their names in the file.

    Where the file has averaged weights of the U-Net too (`model_ema.*`, whose names have lost their dots), these are
    meant.
    """
    found = {}
    for name in file.shapes:
        if name.startswith(prefix) and not re.match(IDLE, short := name.removeprefix(prefix)):
            found[f"text_model.{short.removeprefix('text_model.')}" if prefix == TEXT else short] = name
    if prefix == UNET:
        averaged = {name: AVERAGED + f"diffusion_model.{name}".replace(".", "") for name in found}
        if all(name in file.shapes for name in averaged.values()):
            return averaged
    return found


def widths(file: WeightsFile, names: Mapping[str, str], pattern: str, steps: Iterable[int]) -> list[int]:
    """First dimensions of the weights that the pattern makes of each step.

    Raises:
        UserError: the file has no such weight.
    """
    return [dimension(file, names, pattern.format(step), 0) for step in steps]


def dimension(file: WeightsFile, names: Mapping[str, str], name: str, axis: int) -> int:
    """One dimension of a weight.

    Raises:
        UserError: the file has no such weight.
    """
    try:
        return file.shapes[names[name]][axis]
    except (KeyError, IndexError):
        raise UserError(f"{file.path}: is {described(file)} but lacks {name}; name a whole file") from None


def configuration(name: str) -> dict[str, Any]:
    """Stable Diffusion v1's config of one model."""
    return json.loads((SD_V1 / name / "config.json").read_text())


def unet_sizes(file: WeightsFile, names: Mapping[str, str]) -> dict[str, Any]:
    """What the shapes say of a U-Net's or ControlNet's config."""
    return {
        "block_out_channels": widths(file, names, "input_blocks.{}.0.out_layers.3.bias", (1, 4, 7, 10)),
        "cross_attention_dim": dimension(file, names, "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 1),
    }


def empty_unet(file: WeightsFile, names: Mapping[str, str]) -> nn.Module:
    return UNet2DConditionModel.from_config(configuration("unet") | unet_sizes(file, names))


def empty_vae(file: WeightsFile, names: Mapping[str, str]) -> nn.Module:
    sizes = {"block_out_channels": widths(file, names, "encoder.down.{}.block.0.conv2.bias", range(4))}
    return AutoencoderKL.from_config(configuration("vae") | sizes)


def empty_text_encoder(file: WeightsFile, names: Mapping[str, str]) -> nn.Module:
    sizes = {
        "vocab_size": dimension(file, names, "text_model.embeddings.token_embedding.weight", 0),
        "hidden_size": dimension(file, names, "text_model.embeddings.token_embedding.weight", 1),
        "intermediate_size": dimension(file, names, "text_model.encoder.layers.0.mlp.fc1.weight", 0),
    }
    return CLIPTextModel(CLIPTextConfig(**configuration("text_encoder") | sizes))


MODELS: dict[str, tuple[str, Callable, Callable]] = {
    "unet": (UNET, empty_unet, original_unet_names),
    "vae": (VAE, empty_vae, original_vae_names),
    "text_encoder": (TEXT, empty_text_encoder, original_text_names),
}


def empty_models(file: WeightsFile) -> dict[str, nn.Module]:
    """The U-Net, VAE and text encoder of the file's sizes, on the meta device.

    Raises:
        UserError: the file is no whole Stable Diffusion v1; the line says what it is.
    """
    if (found := described(file)) != "Stable Diffusion v1":
        mend = "give it as --controlnet" if found == "a ControlNet" else "name a file such as sd-v1-4.ckpt"
        raise UserError(f"{file.path}: is {found}, not Stable Diffusion v1; {mend}")
    models = {}
    for name, (prefix, empty, original_names) in MODELS.items():
        names = part(file, prefix)
        with torch.device("meta"):
            models[name] = empty(file, names)
        check(models[name], file, names, original_names)
    return models


def check(model: nn.Module, file: WeightsFile, names: Mapping[str, str], original_names: Callable) -> dict[str, str]:
    """Make sure that the weights are the model's, all of them and no others; returns the model's names by the file's.

    Raises:
        UserError: names how many are missing, unexpected or of another shape, and a few of each.
    """
    wanted = model.state_dict()
    originals = original_names(wanted)
    claimed = {name: names[original] for name, original in originals.items() if original in names}
    shapes = {name: file.shapes[stored] for name, stored in claimed.items()}
    # The original VAE's attention projects by 1x1 convolutions.
    shapes |= {name: shape[:2] for name, shape in shapes.items() if shape == (*wanted[name].shape, 1, 1)}
    shapes |= {original: file.shapes[names[original]] for original in names.keys() - set(originals.values())}
    promised = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    load_strictly(model, promised, str(file.path))
    return {stored: name for name, stored in claimed.items()}


def fill(
    model: nn.Module,
    file: WeightsFile,
    names: Mapping[str, str],
    original_names: Callable,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Give a model on the meta device its weights.

    Args:
        model: of the file's sizes.
        file: to read.
        names: see `part`.
        original_names: of `conversion`, for this kind of model.
        device: of the weights.
        dtype: of the weights.

    Raises:
        UserError: the file has not just this model's weights.
    """
    theirs, wanted, state = check(model, file, names, original_names), model.state_dict(), {}
    for stored, tensor in file.read(theirs):
        tensor = tensor.reshape(wanted[theirs[stored]].shape)
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        state[theirs[stored]] = tensor.to(device, dtype, copy=True, memory_format=layout)
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # the text encoder's positions, which are not saved
                module.register_buffer(name, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)
    return model.eval()


def cache_folder() -> Path:
    """Where converted files are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dlcv-hw2"


def fingerprint(path: Path) -> str:
    """A hash of a file's size, its time of change, and samples of its content, since all of it would take long."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for k in range(65):
            file.seek(max(0, status.st_size - 2**16) * k // 64)
            digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


def converted(file: WeightsFile, copy: Path) -> WeightsFile:
    """The same weights as a safetensors file with the original names and nothing else; the file itself if need be.

    Args:
        file: a `.ckpt` of Stable Diffusion v1.
        copy: to write.
    """
    say(f"{file.path}: keeping a copy that is read sooner, {copy}")
    state, tensors = unpickled(file.path), {}
    for prefix, *_ in MODELS.values():
        tensors |= {prefix + original: state[stored] for original, stored in part(file, prefix).items()}
    try:
        save_tensors(copy, tensors, {"source": file.path.name})
    except UserError as error:
        print(f"warning: {error}; going on without a converted copy, which would be read sooner", file=sys.stderr)
        return file
    return open_weights(copy)


def read_stable_diffusion(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, cache: Path | None = None
) -> dict[str, nn.Module]:
    """The U-Net, VAE and text encoder in a single file of Stable Diffusion v1, in the original layout.

    Args:
        path: a `.safetensors`, or a `.ckpt`, of which no code runs.
        device: of the models.
        dtype: of their weights in memory, whatever they are in the file.
        cache: folder for safetensors made of `.ckpt` files, under their names and hashes; None makes none.

    Raises:
        UserError: the file is missing, truncated, harmful or another model's; the line says what it is.
    """
    path = Path(path)
    copy = None
    if cache is not None and path.is_file() and not is_safetensors(path):
        copy = Path(cache) / f"{path.stem}-{fingerprint(path)}.safetensors"
    known = copy is not None and copy.exists()
    file = open_weights(copy if known else path)
    models = empty_models(file)
    if copy is not None and not known:
        file = converted(file, copy)
    for name, (prefix, _, original_names) in MODELS.items():
        fill(models[name], file, part(file, prefix), original_names, device, dtype).requires_grad_(False)
    return models


def controlnet_part(file: WeightsFile) -> dict[str, str]:
    """Original names of a ControlNet's weights and their names in the file, which may be diffusers'.

    Raises:
        UserError: the file holds no ControlNet; the line says what it is.
    """
    if (found := described(file)) != "a ControlNet":
        raise UserError(f"{file.path}: is {found}, not a ControlNet; name another file")
    if any(name.startswith("controlnet_") for name in file.shapes):
        return {original: name for name, original in original_unet_names(file.shapes).items()}
    prefix = CONTROL if any(name.startswith(CONTROL) for name in file.shapes) else ""
    return part(file, prefix)


def controlnet_sizes(file: WeightsFile, names: Mapping[str, str]) -> dict[str, Any]:
    """What the shapes say of a ControlNet's config; the rest is Stable Diffusion v1's."""
    last = max(int(found[1]) for name in names if (found := re.match(r"input_hint_block\.(\d+)\.", name)))
    hint_widths = widths(file, names, "input_hint_block.{}.bias", range(0, last, 4))
    colours = dimension(file, names, "input_hint_block.0.weight", 1)
    sizes = {"conditioning_channels": colours, "conditioning_embedding_out_channels": hint_widths}
    return sizes | unet_sizes(file, names)

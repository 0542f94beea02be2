"""Learned words and matrices: their files, and a base that knows them.

A learned word is a token with rows of its own in the text encoder's embedding table (Gal et al. 2022). Custom Diffusion
(Kumari et al. 2023) also learns the key and value matrices of the U-Net's cross-attention.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from common.checkpoint import load_tensors, save_tensors
from common.cli import UserError
from common.weights import items_of, load_content
from latent_diffusion.base import Base, vector_tokens

Words = Mapping[str, Tensor]
"""From a token, such as <new1>, to its vectors: float32 (n, width)."""

# The brackets keep a token from being found inside another token or an ordinary prompt.
FORM = re.compile(r"<[^<>\s]+>")
KIND = "CustomDiffusion"
# How the names of the key and value matrices end: in a U-Net, and in diffusers' Custom Diffusion files.
MATRICES = {f".attn2.to_{kind}.weight": f".attn2.processor.to_{kind}_custom_diffusion.weight" for kind in ("k", "v")}


def check_prompts(tokenizer: CLIPTokenizer, prompts: Iterable[str], token: str = "", mention: str = "") -> None:
    """Raise a `UserError`, which starts with `mention`, unless every prompt has `token` and no unknown one in <>."""
    known = {name.lower() for name in tokenizer.added_tokens_encoder}
    for prompt in prompts:
        if token.lower() not in prompt.lower():
            raise UserError(f"{mention}prompt {prompt!r}: is without {token}; write the token into it")
        for found in FORM.findall(prompt):
            if found.lower() not in known:
                raise UserError(f"{mention}prompt {prompt!r}: {found} is no learned word; learn it, or give its file")


def save_words(path: Path, words: Words, about: Mapping[str, Any]) -> None:
    """Write words as a safetensors file: each token's vectors, float32 (n, width), under the token itself.

    diffusers' `load_textual_inversion` takes the path of a file with one word. For several words give it the list
    `[{token: rows} for token, rows in load_file(path).items()]`.
    """
    save_tensors(path, words, {"kind": "words"} | dict(about))


def check_rows(name: str, rows: Tensor, path: Path) -> Tensor:
    """A word's vectors as they are used, float32 (n, width); a `UserError` if they are none, or not finite."""
    if not rows.is_floating_point() or rows.layout != torch.strided or rows.is_meta:
        raise UserError(f"{path}: {name}: vectors of {rows.dtype}, {rows.layout}; save plain ones of torch.float32")
    if rows.ndim not in (1, 2) or not rows.numel():
        raise UserError(f"{path}: {name}: vectors of shape {tuple(rows.shape)}; they must be (n, width)")
    if not rows.isfinite().all():
        raise UserError(f"{path}: {name}: vectors that are not finite; learn the word again")
    return torch.atleast_2d(rows.detach()).float()


def read_words(path: Path) -> Words:
    """The words in one file, however programs write them; a `UserError` if it holds anything else.

    This project and diffusers keep vectors under their token. The original textual inversion and the web UI keep them
    in `string_to_param` or `emb_params`; the token is then the name in the file, or the file's own, in angle brackets.
    """
    held = items_of(load_content(path))
    params = items_of(held.get("string_to_param"))
    found = dict(params.get("_parameters", params) or held)
    if params or "emb_params" in held:
        name = "-".join(str(held.get("name") or Path(path).stem).strip("<>").split())
        found = {token if FORM.fullmatch(token) else f"<{name}>": rows for token, rows in found.items()}
    others = [token for token, rows in found.items() if not isinstance(rows, Tensor) or not FORM.fullmatch(str(token))]
    if others or not found:
        what = f"holds {others[0]}, which is no learned word" if others else "holds no words"
        raise UserError(f"{path}: {what} such as <new1>; name a file that textual_inversion.py wrote")
    return {token: check_rows(token, rows, path) for token, rows in found.items()}


def load_words(*paths: Path) -> Words:
    """The words in files, see `read_words`; a `UserError` if two files have the same word."""
    words = {}
    for path in paths:
        found = read_words(path)
        if twice := sorted(words.keys() & found.keys()):
            raise UserError(f"{path}: has {twice[0]}, as an earlier file has; leave one of them out")
        words |= found
    return words


def matrix_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """The cross-attention's key and value matrices: from each name in the U-Net to its name in a file."""
    names = [name for name, _ in unet.named_parameters()]
    return {name: name.removesuffix(end) + MATRICES[end] for name in names for end in MATRICES if name.endswith(end)}


def save_custom(path: Path, base: Base, words: Words, matrices: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write what Custom Diffusion learned as one safetensors file: words under their tokens, and matrices, all float32.

    The file has an empty tensor for every self-attention, since diffusers' `load_attn_procs` wants one; diffusers 0.42
    ignores the matrices unless that gets the pipeline too. The words go to `load_textual_inversion`.
    """
    names = matrix_names(base.unet)
    tensors = {names[name]: matrix.float() for name, matrix in matrices.items()}
    tensors |= {name: torch.empty(0) for name in base.unet.attn_processors if ".attn1." in name}
    save_tensors(path, dict(words) | tensors, {"kind": KIND} | dict(about))


def load_custom(base: Base, path: Path) -> Base:
    """A base with the words and matrices that `save_custom` wrote; all other weights are shared with the given base.

    A `UserError` if the file is broken, holds something else, or was made for another base.
    """
    tensors, _ = load_tensors(path)
    words = {name: check_rows(name, tensors.pop(name), path) for name in [*tensors] if FORM.fullmatch(name)}
    names = matrix_names(base.unet)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.numel()}
    wanted = {stored: tuple(base.unet.get_parameter(name).shape) for name, stored in names.items()}
    if not any(name.endswith(tuple(MATRICES.values())) for name in shapes):
        raise UserError(f"{path}: holds no matrices of Custom Diffusion; give learned words as --words")
    for name in shapes | wanted:
        if shapes.get(name) != wanted.get(name):
            here, there = (of.get(name, "missing") for of in (shapes, wanted))
            raise UserError(f"{path}: {name}: {here} in the file, {there} in the base; name the base it was made with")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name}: is not finite; train it again, or name another file")
    matrices = {name: tensors[stored] for name, stored in names.items()}
    return add_words(replace(base, unet=with_matrices(base.unet, matrices)), words)


def with_shared_weights(model: nn.Module) -> Any:
    """A copy of a model whose modules can be replaced, but whose weights are the very same tensors."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def with_matrices(unet: UNet2DConditionModel, matrices: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """A U-Net with other matrices, given by their names in it; all other weights are shared with the given U-Net."""
    changed = with_shared_weights(unet)
    for name, matrix in matrices.items():
        layer, _, kind = name.rpartition(".")
        matrix = matrix.detach().to(unet.device, unet.dtype)
        setattr(changed.get_submodule(layer), kind, nn.Parameter(matrix, requires_grad=False))
    return changed


def add_words(base: Base, words: Words) -> Base:
    """A base that also knows these words; the given base stays as it is, and shares all other weights.

    Each vector becomes a token, and a row at the end of the embedding table. A `UserError` if a token is not in angle
    brackets or exists already (in any case), or its vectors are not as wide as the base's.
    """
    tokenizer = copy.deepcopy(base.tokenizer)
    # A table may have more rows than there are tokens; new tokens take their place, as in diffusers.
    old = base.text_encoder.get_input_embeddings().weight.detach()[: len(tokenizer)]
    if len(old) < len(tokenizer):
        raise UserError(f"the base has {len(old)} rows for {len(tokenizer)} tokens; name another base")
    known = {name.lower() for name in tokenizer.get_vocab()}
    for token, rows in words.items():
        if not FORM.fullmatch(token):
            raise UserError(f"token {token!r}: write it in angle brackets and without spaces, such as <new1>")
        if rows.shape[1] != old.shape[1]:
            raise UserError(f"{token}: its vectors are {rows.shape[1]} wide, the base's {old.shape[1]}; name its base")
        for name in vector_tokens(token, len(rows)):
            if name.lower() in known:
                raise UserError(f"token {name!r}: exists already; choose another")
            known.add(name.lower())
            tokenizer.add_tokens(name)
    text_encoder = with_shared_weights(base.text_encoder)
    table = torch.cat([old, *(rows.to(old) for rows in words.values())])
    text_encoder.set_input_embeddings(nn.Embedding.from_pretrained(table))
    text_encoder.config.vocab_size = len(tokenizer)
    return replace(base, tokenizer=tokenizer, text_encoder=text_encoder)


def with_learned(base: Base, words: Sequence[Path], custom: Path | None = None) -> Base:
    """A base with the words in some files, and with what Custom Diffusion wrote to another; see `load_words`."""
    return add_words(load_custom(base, custom) if custom else base, load_words(*words))

"""Learned words: rows of a text encoder's table for tokens of their own, as files and as a base that knows them."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from common.checkpoint import load_tensors, save_tensors
from common.cli import UserError
from latent_diffusion.base import Base, vector_tokens

Words = Mapping[str, Tensor]
"""From a token, such as <new1>, to its vectors: float32 (n, width)."""

# In brackets no token is part of another or of an ordinary prompt, where it would be found too.
FORM = re.compile(r"<[^<>\s]+>")


def check_token(token: str, tokenizer: CLIPTokenizer, vectors: int = 1) -> None:
    """Make sure that a tokenizer can take up a token.

    Raises:
        UserError: it is not written in angle brackets, or the tokenizer has it already, in capitals or not.
    """
    if not FORM.fullmatch(token):
        raise UserError(f"token {token!r}: write it in angle brackets and without spaces, such as <new1>")
    known = {name.lower() for name in tokenizer.get_vocab()}
    for name in vector_tokens(token, vectors):
        if name.lower() in known:
            raise UserError(f"token {name!r}: exists already; choose another")


def check_prompts(tokenizer: CLIPTokenizer, prompts: Iterable[str], token: str = "", mention: str = "") -> None:
    """Make sure that prompts have a token, and none that would be spelled with pieces since nobody learned it.

    Args:
        tokenizer: with all learned words.
        prompts: to look at.
        token: that all must have; "" for any or none.
        mention: what the complaint starts with, such as a file's name and a colon.

    Raises:
        UserError: names the prompt and the token.
    """
    known = {name.lower() for name in tokenizer.added_tokens_encoder}
    for prompt in prompts:
        if token.lower() not in prompt.lower():
            raise UserError(f"{mention}prompt {prompt!r}: is without {token}; write the token into it")
        for found in FORM.findall(prompt):
            if found.lower() not in known:
                raise UserError(f"{mention}prompt {prompt!r}: {found} is no learned word; learn it, or give its file")


def save_words(path: Path, words: Words, about: Mapping[str, Any]) -> None:
    """Write words as a safetensors file: each token's vectors, float32 (n, width), under the token itself.

    diffusers' `load_textual_inversion` reads the file of one word by its path, and that of several as the list
    `[{token: rows} for token, rows in load_file(path).items()]`.

    Raises:
        UserError: the file cannot be written.
    """
    save_tensors(path, {token: rows.float() for token, rows in words.items()}, {"kind": "words"} | dict(about))


def load_words(path: Path) -> Words:
    """Read words that `save_words` or diffusers' own training wrote.

    Raises:
        UserError: the file is missing or broken, or holds anything but words.
    """
    tensors, _ = load_tensors(path)
    others = [name for name, rows in tensors.items() if not FORM.fullmatch(name) or rows.ndim not in (1, 2)]
    if others or not tensors:
        what = f"holds {others[0]}, which is no learned word" if others else "holds no words"
        raise UserError(f"{path}: {what} such as <new1>; name a file that textual_inversion.py wrote")
    return {token: torch.atleast_2d(rows).float() for token, rows in tensors.items()}


def load_all_words(paths: Sequence[Path]) -> Words:
    """The words of several files as one.

    Raises:
        UserError: as `load_words`, or two files have a word of one name.
    """
    together = {}
    for path in paths:
        words = load_words(path)
        if twice := sorted(together.keys() & words.keys()):
            raise UserError(f"{path}: has {twice[0]}, as an earlier file has; leave one of them out")
        together |= words
    return together


def with_shared_weights(model: nn.Module) -> Any:
    """A copy of a model whose modules can be changed, but whose weights are the very same tensors."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def with_tokens(base: Base, vectors: Mapping[str, int]) -> CLIPTokenizer:
    """A copy of a base's tokenizer that has tokens more, for words of so many vectors, numbered on in their order.

    Raises:
        UserError: see `check_token`; or the table of the base's text encoder has fewer rows than its tokenizer tokens.
    """
    tokenizer = copy.deepcopy(base.tokenizer)
    if (rows := len(base.text_encoder.get_input_embeddings().weight)) < len(tokenizer):
        raise UserError(f"the base has {rows} rows for {len(tokenizer)} tokens; name another base")
    for token, count in vectors.items():
        check_token(token, tokenizer, count)
        tokenizer.add_tokens(vector_tokens(token, count))
    return tokenizer


def with_table(text_encoder: CLIPTextModel, table: nn.Module, rows: int) -> CLIPTextModel:
    """A text encoder of the same weights that looks its tokens up in another table of so many rows."""
    text_encoder = with_shared_weights(text_encoder)
    text_encoder.set_input_embeddings(table)
    text_encoder.config.vocab_size = rows
    return text_encoder


def add_words(base: Base, words: Words) -> Base:
    """A base that knows these words too; everything else in it is the given base's, which stays as it is.

    Raises:
        UserError: a word's token exists already or is badly written, or its vectors are not as wide as the base's.
    """
    tokenizer = with_tokens(base, {token: len(rows) for token, rows in words.items()})
    old = base.text_encoder.get_input_embeddings().weight
    for token, rows in words.items():
        if rows.shape[1] != old.shape[1]:
            raise UserError(f"{token}: its vectors are {rows.shape[1]} wide, the base's {old.shape[1]}; name its base")
    new = [rows.to(old.device, old.dtype) for rows in words.values()]
    # As diffusers does, rows that a table has beyond its tokens make room.
    weight = torch.cat([old[: len(base.tokenizer)].detach(), *new])
    table = nn.Embedding.from_pretrained(weight, freeze=True)
    return replace(base, tokenizer=tokenizer, text_encoder=with_table(base.text_encoder, table, len(weight)))

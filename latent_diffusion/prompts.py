"""From prompts to tokens; a learned word of several vectors stands for as many tokens."""

import re
import sys
from collections.abc import Sequence

from torch import Tensor
from transformers import CLIPTokenizer


def vector_tokens(token: str, vectors: int) -> list[str]:
    """The tokens that a word of so many vectors stands for, as diffusers names them: <new>, <new>_1, <new>_2, ..."""
    return [token, *(f"{token}_{k}" for k in range(1, vectors))]


def with_all_vectors(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The prompt in which the tokens of all its vectors stand for every learned word of several vectors."""
    added = tokenizer.added_tokens_encoder
    for token in added:
        vectors = 1
        while f"{token}_{vectors}" in added:
            vectors += 1
        if vectors > 1:
            # Not within the name of another vector; in any case, since the tokenizer takes no notice of it either.
            pattern, whole = rf"{re.escape(token)}(?!_\d)", " ".join(vector_tokens(token, vectors))
            prompt = re.sub(pattern, lambda _, whole=whole: whole, prompt, flags=re.IGNORECASE)
    return prompt


def prompt_tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str], where: Sequence[str] | None = None) -> Tensor:
    """What a text encoder is given for each prompt: int64 (N, longest), between start and end, padded.

    Prompts with more tokens than the encoder takes (77, of which two mark start and end) are cut, with a line on
    stderr for each.

    Args:
        tokenizer: the text encoder's.
        prompts: texts; an empty one means "no condition".
        where: the file and line of each, to be named when it is cut.
    """
    longest = tokenizer.model_max_length
    whole = [with_all_vectors(tokenizer, prompt) for prompt in prompts]
    for k, ids in enumerate(tokenizer(whole, verbose=False).input_ids):
        if len(ids) > longest:
            mention = f"{where[k]}: " if where else ""
            print(
                f"warning: {mention}prompt of {len(ids)} tokens is cut to {longest}: {prompts[k][:40]!r}...",
                file=sys.stderr,
            )
    options = {"padding": "max_length", "max_length": longest, "truncation": True}
    return tokenizer(whole, **options, return_tensors="pt").input_ids

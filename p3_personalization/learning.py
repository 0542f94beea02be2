"""Learning words with a frozen base: what is trained lies beside it, and is put in its place for every call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from common.cli import UserError
from common.data import shuffled_indices, stratified_timesteps
from common.training import Batch, diffusion_loss
from latent_diffusion.base import Base
from p3_personalization.views import Examples
from p3_personalization.words import Words, with_table, with_tokens

ROWS = "embeddings.token_embedding.rows"  # where a text encoder with a `GrownTable` has the trained ones
WATCHED_TIMES = 8  # timesteps a picture in the validation loss


class GrownTable(nn.Module):
    """An embedding table whose last rows may be trained while the others stay as they are.

    Args:
        frozen: rows of the tokens 0, 1, ..., (V, width); no copy is made.
        rows: of the tokens from V on, (n, width).
    """

    def __init__(self, frozen: Tensor, rows: Tensor):
        super().__init__()
        self.frozen = nn.Buffer(frozen, persistent=False)
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        first = len(self.frozen)
        old = F.embedding(tokens.clamp(max=first - 1), self.frozen)
        new = F.embedding((tokens - first).clamp(min=0), self.rows)
        return torch.where((tokens < first)[..., None], old, new.to(old.dtype))


def with_new_rows(base: Base, vectors: Mapping[str, int]) -> Base:
    """A base with tokens more, whose rows are to be put in by `Learned`; until then they are zeros.

    Args:
        base: stays as it is, and shares its weights.
        vectors: how many each new token has.

    Raises:
        UserError: a token exists already, or is badly written.
    """
    tokenizer = with_tokens(base, vectors)
    old = base.text_encoder.get_input_embeddings().weight.detach()[: len(base.tokenizer)]
    table = GrownTable(old, old.new_zeros(sum(vectors.values()), old.shape[1]))
    return replace(base, tokenizer=tokenizer, text_encoder=with_table(base.text_encoder, table, len(tokenizer)))


def rows_like(base: Base, words: str, vectors: int) -> Tensor:
    """Rows to start from: those of known words, in turn, float32 (vectors, width).

    Raises:
        UserError: the words are more than `vectors` tokens, or none.
    """
    tokens = base.tokenizer(words, add_special_tokens=False).input_ids
    if not 1 <= len(tokens) <= vectors:
        pieces = ", ".join(piece.removesuffix("</w>") for piece in base.tokenizer.convert_ids_to_tokens(tokens))
        raise UserError(
            f"--initialiser {words!r}: is {len(tokens)} tokens ({pieces}) for {vectors} vectors; give at most as many,"
            " or raise --vectors"
        )
    table = base.text_encoder.get_input_embeddings().weight
    return table.detach()[[tokens[k % len(tokens)] for k in range(vectors)]].float().clone()


class Learned(nn.Module):
    """What is trained: rows of new words, and in Custom Diffusion some of the U-Net's matrices.

    Args:
        rows: to start from, (n, width).
        matrices: of the U-Net by their names, to start from; empty for textual inversion.
    """

    def __init__(self, rows: Tensor, matrices: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.rows = nn.Parameter(rows.clone())
        # A parameter's name may not have dots.
        parameters = {name.replace(".", "/"): nn.Parameter(m.clone()) for name, m in (matrices or {}).items()}
        self.matrices = nn.ParameterDict(parameters)

    def unet_weights(self) -> dict[str, Tensor]:
        """The matrices by their names in the U-Net."""
        return {name.replace("/", "."): parameter for name, parameter in self.matrices.items()}

    def words(self, vectors: Mapping[str, int]) -> Words:
        """The rows, split between the words in their order."""
        return dict(zip(vectors, self.rows.detach().float().cpu().split(list(vectors.values()))))

    def forward(self, base: Base, xt: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The base's prediction, with what is learned in its place.

        Args:
            base: from `with_new_rows`.
            xt: noised latents (N, C, h, w).
            t: timesteps (N,).
            tokens: of the prompts (N, longest).
        """
        context = functional_call(base.text_encoder, {ROWS: self.rows}, (tokens,)).last_hidden_state
        condition = {"encoder_hidden_states": context}
        return functional_call(base.unet, self.unet_weights(), (xt, t), condition).sample


def learning_loss(learned: nn.Module, base: Base, batch: Batch) -> Tensor:
    """How far the prediction is off, which only what is learned can mend (Gal et al. 2022, equation 2).

    Args:
        learned: a `Learned`, bare or wrapped.
        base: from `with_new_rows`.
        batch: latents `x0`, noise `eps`, timesteps `t` and `tokens`.
    """
    return diffusion_loss(
        lambda xt, t, tokens: learned(base, xt, t, tokens), batch, base.schedule, base.prediction, gamma=0
    )


class ExampleBatches:
    """Draws the batches: a share of every one comes from each of several kinds of examples.

    Args:
        kinds: of examples, such as the concept's pictures and its class's.
        counts: how many of each kind a batch has.
        T: timesteps of the schedule.
        seed: of the order in which pictures come.
    """

    def __init__(self, kinds: Sequence[Examples], counts: Sequence[int], T: int, seed: int):
        self.kinds, self.counts, self.T, self.seed = kinds, counts, T, seed

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        taken = []
        for kind, count in zip(self.kinds, self.counts):
            if count:
                index = shuffled_indices(len(kind), self.seed, step * count, count)
                taken.append(kind.take(index, generator))
        x0, tokens = (torch.cat(parts) for parts in zip(*taken))
        t = stratified_timesteps(len(x0), self.T, generator)
        return {"x0": x0, "tokens": tokens, "t": t, "eps": torch.randn(x0.shape, generator=generator)}


def watched(examples: Examples, base: Base, batch_size: int, generator: torch.Generator) -> Callable:
    """A validation loss: of always the same noise on the whole pictures, at timesteps spread evenly.

    A step's own loss says little, since noise and timestep decide most of it.

    Returns:
        A function from a `Learned` to its mean loss.
    """
    count = len(examples)
    x0 = examples.latents[:, 0].repeat_interleave(WATCHED_TIMES, dim=0)
    tokens = torch.stack([sentences[0] for sentences in examples.tokens]).repeat_interleave(WATCHED_TIMES, dim=0)
    t = ((torch.arange(WATCHED_TIMES) + 0.5) / WATCHED_TIMES * base.schedule.T).long().repeat(count)
    batch = {"x0": x0, "tokens": tokens, "t": t, "eps": torch.randn(x0.shape, generator=generator)}

    def loss(learned: nn.Module) -> Tensor:
        parts = []
        for start in range(0, len(x0), batch_size):
            part = {name: rows[start : start + batch_size].to(base.device) for name, rows in batch.items()}
            parts.append(learning_loss(learned, base, part) * len(part["x0"]))
        return torch.stack(parts).sum() / len(x0)

    return loss

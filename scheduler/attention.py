"""How a request's output attends: part of the vocabulary, which `scheduler.types` hands on.

The row of an output token is sparse by its position in the sequence, not by the step it is computed in: alone, as a
draft under verification, or in a chunk after a preemption it reads the same keys (R4). Rows of the prompt are dense,
or as `prompt_attention.py` says.

Corrections come at positions, too: with `correct_every` n, the rows of the first kn output tokens are dense for
whatever comes behind them. So each of them is computed twice, sparse for its own token and dense for those from the
next multiple of n on (`decoding/autoregressive.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class AttentionMethod(StrEnum):
    """How a row chooses the keys it reads (`kernels/sparse.py: Method`)."""

    QUEST = "quest"
    DOUBLE_SPARSITY = "double_sparsity"
    TIDAL = "tidal"
    DOUBLE_SPARSITY_PAGES = "double_sparsity_pages"

    @property
    def has_labels(self) -> bool:
        """Whether it scores keys by labels, whose channels a calibration must have found."""
        return self in (AttentionMethod.DOUBLE_SPARSITY, AttentionMethod.DOUBLE_SPARSITY_PAGES)


@dataclass(frozen=True, slots=True)
class AttentionOffer:
    """A method that requests may choose here, and the smallest budget it works with."""

    method: AttentionMethod
    least_budget: int


ALL_DENSE = 1 << 30
"""Where the dense rows end of a sequence that has no others: behind every position."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Sparse attention of a request's output tokens; None in its place = every row reads all it may see.

    budget    most keys that a row reads, in each layer that the method does not leave dense
    lossless  only drafts are made so, and the rows that verify them read everything: the text is the dense one
    correct_every   so many output tokens at a time have their keys and values computed again by rows that read
                    everything, before the next token's row; 0 = never. Not with `lossless`: nothing is to be corrected
    """

    method: AttentionMethod
    budget: int
    lossless: bool = False
    correct_every: int = 0

    def misfit(self, offers: Sequence[AttentionOffer]) -> tuple[str, str] | None:
        """(field, what is wrong with it) if no method that is offered can do this; None = one can."""
        offer = next((offer for offer in offers if offer.method is self.method), None)
        if offer is None:
            known = ", ".join(offer.method for offer in offers)
            have = f"this server has dense and {known}" if offers else "this server has dense attention alone"
            return "method", f"is {self.method}, but {have} (sparse-attention)"
        if self.budget < offer.least_budget:
            return "budget", f"is {self.budget}, but {self.method} needs at least {offer.least_budget} keys here"
        if self.correct_every < 0:
            return "correct_every", f"is {self.correct_every}, but must be 0 (never) or a number of tokens"
        if self.correct_every and self.lossless:
            return "correct_every", f"is {self.correct_every}, but with lossless no key or value has to be corrected"
        return None

    def dense_end(self, num_prompt: int, num_tokens: int) -> int:
        """Where sparse rows begin for whoever knows `num_tokens` tokens: the row of the last one sees all before it
        dense. Not to be asked of a lossless one, which has no sparse rows."""
        every, num_before = self.correct_every, num_tokens - 1 - num_prompt
        return num_prompt + (num_before // every * every if every and num_before > 0 else 0)


def leaves_keys_out(attention: Attention | None) -> bool:
    """Whether rows of a request's output leave keys out for good."""
    return attention is not None and not attention.lossless

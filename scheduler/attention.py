"""How a request's output attends: part of the vocabulary, which `scheduler.types` hands on.

The row of an output token is sparse by its position in the sequence, not by the step it is computed in: alone, as a
draft under verification, or in a chunk after a preemption it reads the same keys (R4). Rows of the prompt are dense,
or as `prompt_attention.py` says.
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


@dataclass(frozen=True, slots=True)
class AttentionOffer:
    """A method that requests may choose here, and the smallest budget it works with."""

    method: AttentionMethod
    least_budget: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Sparse attention of a request's output tokens; None in its place = every row reads all it may see.

    budget    most keys that a row reads, in each layer that the method does not leave dense
    lossless  only drafts are made so, and the rows that verify them read everything: the text is the dense one
    """

    method: AttentionMethod
    budget: int
    lossless: bool = False

    def misfit(self, offers: Sequence[AttentionOffer]) -> tuple[str, str] | None:
        """(field, what is wrong with it) if no method that is offered can do this; None = one can."""
        offer = next((offer for offer in offers if offer.method is self.method), None)
        if offer is None:
            known = ", ".join(offer.method for offer in offers)
            have = f"this server has dense and {known}" if offers else "this server has dense attention alone"
            return "method", f"is {self.method}, but {have} (sparse-attention)"
        if self.budget < offer.least_budget:
            return "budget", f"is {self.budget}, but {self.method} needs at least {offer.least_budget} keys here"
        return None


def leaves_keys_out(attention: Attention | None) -> bool:
    """Whether rows of a request's output leave keys out for good."""
    return attention is not None and not attention.lossless

"""What a decoding state machine is: integers only, it says which span a sequence needs next and what an outcome means.

The scheduler knows no decoding method; it asks. Tensors, logits and sampling rules are the worker's.
"""

from __future__ import annotations

from typing import Protocol

from scheduler.types import Outcome, Span, TokenLogprob


class BadOutcome(Exception):
    """The worker's outcome does not answer the span. The sequence fails; the message says how they differ."""


class Decoding(Protocol):
    """The state machine of one sequence, from admission to its end."""

    @property
    def judges_prompt(self) -> bool:
        """True while the next prefill spans judge every row, so that the scheduler bounds their length."""
        ...

    def next_span(self, budget: int) -> Span:
        """The next span, of at most `budget` >= 1 tokens. Asking changes nothing: only `absorb` learns."""
        ...

    def absorb(self, span: Span, outcome: Outcome) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Advance the sequence. Returns output tokens that can no longer change (R8) and prompt logprobs, each once.

        Sets the sequence's finish_reason when it ends. Raises BadOutcome, having changed nothing.
        """
        ...

    def restart(self) -> None:
        """The sequence lost its KV: its tokens will be computed again."""
        ...

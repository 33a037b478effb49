"""What a decoding state machine is: integers only, it says which span a sequence needs next and what an outcome means.

The scheduler knows no decoding method; it asks. Tensors, logits and sampling rules are the worker's.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from scheduler.types import Drafts, Outcome, Span, SpeculationUsage, TokenLogprob


class BadOutcome(Exception):
    """The worker's outcome does not answer the span. The sequence fails; the message says how they differ."""


class News(NamedTuple):
    """What an outcome told: output tokens that can no longer change (R8) and logprobs, each once.

    speculation   what the drafts verified for these tokens came to, if there were any
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    speculation: SpeculationUsage | None = None


class Decoding(Protocol):
    """The state machine of one sequence, from admission to its end.

    drafts      offered for the next span; forgotten when the sequence loses its KV
    """

    drafts: Drafts | None

    @property
    def judges_prompt(self) -> bool:
        """True while the next prefill spans judge every row, so that the scheduler bounds their length."""
        ...

    @property
    def most_drafts(self) -> int:
        """Most drafts that the next decode span can use: after them and one more token the sequence is full."""
        ...

    def next_span(self, budget: int, num_drafts: int = 0) -> Span:
        """The next span, of at most `budget` >= 1 tokens. Asking changes nothing: only `absorb` learns.

        A decode takes its first `budget` - 1 drafts along. `num_drafts` is passed on (`Span.num_drafts`).
        """
        ...

    def absorb(self, span: Span, outcome: Outcome) -> News:
        """Advance the sequence, and set its finish_reason when it ends. Raises BadOutcome, having changed nothing."""
        ...

    def restart(self) -> None:
        """The sequence lost its KV: its tokens will be computed again."""
        ...

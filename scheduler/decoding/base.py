"""What a decoding state machine is: integers only, it says which span a sequence needs next and what an outcome means.

The scheduler knows no decoding method; it asks. Tensors, logits and sampling rules are the worker's.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol

from scheduler.types import DecodingUsage, Drafts, Outcome, Snapshot, Span, SpeculationUsage, TokenLogprob


class BadOutcome(Exception):
    """The worker's outcome does not answer the span. The sequence fails; the message says how they differ."""


class News(NamedTuple):
    """What an outcome told: output tokens that can no longer change (R8) and logprobs, each once.

    speculation   what the drafts verified for these tokens came to, if there were any
    decoding      what denoising took since the last news that became a delta
    snapshot      the block as it stands, where the request asked for it: reason enough for a delta
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    speculation: SpeculationUsage | None = None
    decoding: DecodingUsage | None = None
    snapshot: Snapshot | None = None


class After(IntEnum):
    """What can be told of a sequence before the span that is computed right now has given anything.

    OPEN    its next span depends on what this one gives
    PROMPT  rows of its prompt are left; no token comes of this one
    TOKEN   one token comes, and the next span is that token's row, unless the token ends the sequence
    END     the span is its last, whatever it gives
    """

    OPEN = 0
    PROMPT = 1
    TOKEN = 2
    END = 3


class Widths(NamedTuple):
    """Rows of the next denoise span: as few as it can do with, and as many as it can use. Nothing in between.

    narrow = wide where there is no choice; a narrow span that only commits a finished block fixes no token.
    """

    narrow: int
    wide: int


class Decoding(Protocol):
    """The state machine of one sequence, from admission to its end.

    While `Sequence.num_committed < Sequence.prefill_end` it is not one that decodes token by token: it has prompt rows
    left, or it denoises. A machine that denoises keeps `prefill_end` ahead for as long as it lives.

    drafts       offered for the next span; forgotten when the sequence loses its KV
    is_denoiser  it has denoise spans (`is_denoising`, `widths`); otherwise it decodes once its prompt is computed
    grain        its prompt's chunks are multiples of so many rows
    mask_block   of its spans; part of the names of its pages, since equal tokens under another mask have other KV
    """

    drafts: Drafts | None

    @property
    def is_denoiser(self) -> bool: ...

    @property
    def grain(self) -> int: ...

    @property
    def mask_block(self) -> int: ...

    @property
    def judges_prompt(self) -> bool:
        """True while the next prefill spans judge every row, so that the scheduler bounds their length."""
        ...

    @property
    def most_drafts(self) -> int:
        """Most drafts that the next decode span can use: after them and one more token the sequence is full."""
        ...

    @property
    def prompt_end(self) -> int:
        """`Sequence.prefill_end` of a sequence that is admitted now: KV tokens up to the end of its first judged span.

        Chunks of the prompt are cut from the rows before it; the last one may take the first denoise step along.
        """
        ...

    @property
    def reach(self) -> int:
        """KV tokens that the sequence has room for after its next span, at its widest: pages are taken for them."""
        ...

    @property
    def most_cached(self) -> int:
        """Tokens of a prefix hit, at most: what is behind them must be computed."""
        ...

    @property
    def is_denoising(self) -> bool:
        """No prompt rows are left and the next span denoises. Never true of a machine that is no denoiser."""
        ...

    @property
    def widths(self) -> Widths:
        """Of the next denoise span. Only to be asked of a machine that is denoising."""
        ...

    @property
    def least_rows(self) -> int:
        """The narrowest that any of its spans can have to be: a denoise span cannot be cut."""
        ...

    def next_span(self, budget: int, num_drafts: int = 0) -> Span:
        """The next span, of at most `budget` >= 1 tokens. Asking changes nothing: only `absorb` learns.

        A decode takes its first `budget` - 1 drafts along. `num_drafts` is passed on (`Span.num_drafts`). A prompt
        chunk has a multiple of `grain` rows; a denoise span is as wide as `widths` and `budget` allow.
        """
        ...

    def foresee(self, span: Span) -> After:
        """What `absorb` will have made of the sequence. OPEN is always right, and keeps the next step waiting."""
        ...

    def absorb(self, span: Span, outcome: Outcome) -> News:
        """Advance the sequence, and set its finish_reason when it ends. Raises BadOutcome, having changed nothing."""
        ...

    def restart(self) -> None:
        """The sequence lost its KV: its tokens will be computed again."""
        ...

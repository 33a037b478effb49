"""One growing token string with its KV. Mutable, and only this package changes one (R6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from scheduler.attention import ALL_DENSE
from scheduler.types import FinishReason, Request

if TYPE_CHECKING:
    from scheduler.decoding.base import Decoding
    from scheduler.denoising import DenoiseState
    from scheduler.draft_state import DraftState


class Status(IntEnum):
    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    order           (priority, arrival number): who comes first, in every queue
    seq_id          the worker's name for it; a new one at each admission, 0 while it waits
    tokens          prompt + output so far
    num_committed   tokens whose KV is final; KV past it is scratch (R3)
    prefill_end     KV tokens to compute before it decodes: all tokens it had when it was admitted; where it denoises,
                    the end of its block, which is always ahead
    high_water      most tokens ever committed: what is computed again below it was lost to a preemption
    pages           page table; page_names the chained names of its full pages; num_entered pages offered to the index
    num_announced   pages announced as pending in the index
    dense_end       rows before it are dense for good: the prompt's, and those that were corrected; rows from it on may
                    leave keys out, so that their pages are the request's own (`scheduler/attention.py`)
    deferred_on     name of the page it waits for a running sequence to compute
    waiting_since_s when it entered the queue, last time
    last_step       of one that ended: its pages are its own until this step is over
    denoising       what is known of its denoise spans; None until it has one
    drafting        what is known of its drafts; None where nobody drafts
    """

    request: Request
    order: tuple[int, int]
    arrival_s: float
    tokens: list[int]
    decoding: Decoding = field(init=False)
    seq_id: int = 0
    status: Status = Status.WAITING
    num_committed: int = 0
    prefill_end: int = 0
    high_water: int = 0
    pages: list[int] = field(default_factory=list)
    page_names: list[bytes] = field(default_factory=list)
    num_entered: int = 0
    num_announced: int = 0
    dense_end: int = ALL_DENSE
    deferred_on: bytes | None = None
    waiting_since_s: float = 0.0
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    cached_tokens: int = 0
    num_preemptions: int = 0
    admitted_s: float | None = None
    first_token_s: float | None = None
    has_sent: bool = False
    drafting: DraftState | None = None
    denoising: DenoiseState | None = None
    last_step: int = 0

    @property
    def is_correcting(self) -> bool:
        """Rows of its output are computed again, and its last token waits for them."""
        return self.num_committed < self.prefill_end == self.dense_end and self.num_output > 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

"""The drafter protocol: who proposes tokens, from what, and what it is told.

A drafter may be wrong, slow to warm up or silent; it is never trusted. Verification decides every token, so nothing
here can change a text (coupled verification) or a distribution (the rejection modes). Speculative reference, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scheduler.types import Drafts
from server.worker.sequences import SequenceState


class RowTops(NamedTuple):
    """The best tokens of the rows that led to this step's emitted tokens, for drafters that learn from logits.

    ends      for each row, how many of the sequence's tokens its context has: the row follows tokens[ends - 1]
    ids       int32 [rows, k], best first
    logprobs  float32 [rows, k], of the processed distribution
    """

    ends: tuple[int, ...]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


class Want(NamedTuple):
    """One sequence that may get drafts at the end of a step.

    tokens      prompt + output, this step's tokens included; the last one has no KV yet
    num_drafts  most drafts that are of use
    tops        there if the drafter's `needs_top` asked and the sequence was judged in this step
    tree        whether the drafts may branch; set by the `Speculator`, which knows what request and model allow
    probed      hidden states of the rows that a prober appended to the step (probes.py), if its drafts were all right
    """

    seq_id: int
    state: SequenceState
    tokens: Sequence[int]
    num_drafts: int
    tops: RowTops | None = None
    tree: bool = False
    probed: Tensor | None = None

    @property
    def num_output(self) -> int:
        """Output tokens so far, which is the output position (R5: of the noise) of the first draft."""
        return len(self.tokens) - self.state.num_prompt


class Drafter(Protocol):
    """One source of drafts. Called from the loop's thread only."""

    name: str
    is_sequential: bool
    """It runs model forwards, one per draft token: it only works when the plan's `draft_depth` is above 0."""
    needs_top: int
    """How many best tokens of each judged row it learns from; 0 = none."""

    def serves(self, state: SequenceState) -> bool:
        """Whether it can ever have something for this sequence; if not, it is never asked. Fixed at admission."""
        ...

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        """Learn what is new in each sequence's tokens (by position: twice is the same as once), then offer drafts.

        depth  most sequential model steps (model drafters only)
        One entry per want; None = nothing to offer. Never more than `num_drafts`, fewer is fine.
        """
        ...

    def release(self, seq_id: int, state: SequenceState) -> None:
        """The sequence is gone (finished, aborted or preempted). Idempotent; also for sequences never seen."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory held by what it has learnt and by its own KV and weights."""
        ...

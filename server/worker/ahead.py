"""A step that is begun before the tokens of the one before it are on the host: its rows take them from the device.

A step whose tokens depend on nothing that only the host knows chooses them as soon as its forward is under way. They
stay on the device for the next step, and go to the host beside it. Whoever begins a step ahead must know which steps
can be followed so; the scheduler's rule (`Decoding.foresee`) is the narrower one, and the worker refuses the rest.

Source: the asynchronous scheduling of vLLM v1, the overlap scheduler of SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scheduler.types import UNKNOWN, Read, Span, StepPlan
from server.worker.batch import Batch
from server.worker.reader import Part
from server.worker.sampling import Reading
from server.worker.sequences import SequenceState
from server.worker.transfer import upload


def can_choose_early(spans: Sequence[Span], states: Sequence[SequenceState]) -> bool:
    """All that is read of the step is a token of some last rows, and its log-probabilities."""
    return all(map(_is_plain, spans, states))


def _is_plain(span: Span, state: SequenceState) -> bool:
    if span.num_drafts:
        return False
    if span.read is Read.NOTHING:
        return True
    return span.read is Read.SAMPLE and len(span.judged) == 1 and span.start + span.judged[0] == len(state.history) - 1


class _Sampled(NamedTuple):
    """Of one step: which row of ids_J, int64 on the device, is the token of which sequence."""

    step: int
    rows: Mapping[int, int]
    ids_J: Tensor


class TokensAhead:
    """The tokens that the last step has chosen, for the one after it."""

    def __init__(self) -> None:
        self._sampled: _Sampled | None = None
        self._awaited: int | None = None

    def keep(self, step: int, spans: Sequence[Span], parts: Sequence[Part]) -> None:
        """Called when a step has chosen its tokens early."""
        rows = {spans[index].seq_id: row for row, index in enumerate(i for part in parts for i in part.indices)}
        # Of a plain step each span has one row.
        ids = [part.chosen.ids_J for part in parts]
        self._sampled = _Sampled(step, rows, ids[0] if len(ids) == 1 else torch.cat(ids)) if ids else None

    def fill(self, plan: StepPlan, batch: Batch) -> None:
        """Put the tokens that a plan does not know into the batch. Raises ValueError if they were not chosen yet."""
        if plan.after is None:
            return
        unknown = [index for index, span in enumerate(plan.spans) if span.tokens[0] == UNKNOWN]
        self._awaited = plan.after
        if not unknown:
            return
        sampled = self._sampled
        if sampled is None or sampled.step != plan.after:
            raise ValueError(f"step {plan.step} takes tokens of step {plan.after}, which were not chosen early")
        rows = np.asarray([batch.first_rows[index] for index in unknown], dtype=np.int64)
        sources = np.asarray([sampled.rows[plan.spans[index].seq_id] for index in unknown], dtype=np.int64)
        targets, taken = upload([rows, sources], batch.tokens.device)
        # A row that no token can be drawn from ends its sequence; until that is known it is computed with any.
        batch.tokens.index_copy_(0, targets, sampled.ids_J[taken].clamp_(min=0))

    def settle(
        self, step: int, spans: Sequence[Span], states: Sequence[SequenceState], readings: Mapping[int, Reading]
    ) -> None:
        """Enter a step's tokens into the histories in which the step after it has left room for them."""
        if step != self._awaited:
            return
        self._awaited = None
        for index, reading in readings.items():
            if reading.tokens:
                states[index].settle(spans[index].kv_len, reading.tokens[0])


def forget_unknown(states: Iterable[SequenceState]) -> None:
    """Before sequences are let go: one that failed has a row whose token will never be known."""
    for state in states:
        state.forget_unknown()

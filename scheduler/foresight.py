"""The step after the one in flight: what can be told of it before that one's tokens are known.

Nothing here is a second truth. For as long as a step is being planned, the sequences stand where the step in flight
will leave them, a token that is not known yet being `UNKNOWN`; then they are put back, and `update` finds them as they
were.

Source: the asynchronous scheduling of vLLM v1 and the overlap scheduler of SGLang. Departure: no counters of
placeholders beside the lengths; a step is planned ahead only where every sequence's next span can be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

from scheduler.decoding.base import After
from scheduler.draft_plan import DraftPlan
from scheduler.sequence import Sequence, Status
from scheduler.types import UNKNOWN, Span, StepResult


class Flight(NamedTuple):
    """A step that was planned and is not over. is_ahead: it was planned while another one was in flight."""

    step: int
    draft: DraftPlan
    is_ahead: bool = False


@contextmanager
def foreseen(flight: Flight, running: Many[Sequence]) -> Iterator[list[Sequence]]:
    """Inside, the sequences that go on after the step in flight, in order, stand where it will leave them. None go on
    if what one of them does next cannot be told."""
    spans = zip(flight.draft.owners, flight.draft.spans, strict=True)
    in_step = [(seq, span, seq.decoding.foresee(span)) for seq, span in spans]
    # Of those that have left meanwhile, too: how the step is read does not change with them.
    if any(after is After.OPEN for _, _, after in in_step):
        yield []
        return
    in_step = [one for one in in_step if one[0].status is Status.RUNNING]
    _advance(in_step)
    try:
        ending = {seq for seq, _, after in in_step if after is After.END}
        yield [seq for seq in running if seq.status is Status.RUNNING and seq not in ending]
    finally:
        _put_back(in_step)


def _advance(in_step: Many[tuple[Sequence, Span, After]]) -> None:
    for seq, span, after in in_step:
        if after is not After.END:
            seq.num_committed = span.kv_len
        if after is After.TOKEN:
            seq.tokens.append(UNKNOWN)


def _put_back(in_step: Many[tuple[Sequence, Span, After]]) -> None:
    for seq, span, after in in_step:
        seq.num_committed = span.start
        if after is After.TOKEN:
            seq.tokens.pop()


def without_surplus(draft: DraftPlan, result: StepResult, is_over: Many[bool]) -> tuple[StepResult, int]:
    """Take the rows of sequences that had ended out of a step that was planned ahead, and count them: they teach
    nobody anything. Drafts, which are known by their rows, are never verified in such a step."""
    num_surplus = sum(is_over)
    if num_surplus:
        stays = [not over for over in is_over]
        draft.owners, draft.spans = list(compress(draft.owners, stays)), list(compress(draft.spans, stays))
        result = replace(result, outcomes=tuple(compress(result.outcomes, stays)))
    return result, num_surplus

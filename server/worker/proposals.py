"""The end of a step: drafts for the sequences that may have some in their next one.

Without a speculator, or in a step whose plan wants no drafts, nothing here runs (k = 0 is free).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from scheduler.types import Drafts, Span
from server.worker.drafters.base import Want
from server.worker.sampling import Reading
from server.worker.sequences import SequenceState

NOTHING_PROBED: Mapping[int, Tensor] = MappingProxyType({})


class Proposer(Protocol):
    """What the worker calls: all drafters as one (`drafters/speculator.py`)."""

    @property
    def needs_top(self) -> int:
        """How many best tokens of each judged row any drafter learns from; 0 = none."""
        ...

    @property
    def drafters(self) -> tuple[tuple[str, bool], ...]:
        """(name, whether it runs a model step by step) of each drafter."""
        ...

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        """An offer or None per want. Never raises for a drafter's fault."""
        ...

    def release(self, released: Iterable[tuple[int, SequenceState]]) -> None:
        """These sequences are gone: ids and the last states."""
        ...

    def close(self) -> None:
        """Keep what was learnt, if it is to be kept."""
        ...


def propose(
    proposer: Proposer,
    spans: Sequence[Span],
    states: Sequence[SequenceState],
    readings: Mapping[int, Reading],
    depth: int,
    probed: Mapping[int, Tensor] = NOTHING_PROBED,
) -> dict[int, Drafts]:
    """{index of a span: drafts for its sequence's next one}. depth: as `StepPlan.draft_depth`.

    probed: {index of a span: hidden states of the rows that a prober appended to it}

    The drafters see a history that ends in the token just chosen. It is taken back afterwards: in a history for good
    is only what a plan has confirmed, so that a step may be run again.
    """
    wants = {}
    for index, reading in readings.items():
        want = _want(spans[index], states[index], reading, probed.get(index))
        if want is not None:
            wants[index] = want
    if not wants:
        return {}
    for index, want in wants.items():
        want.state.draft_q = None
        want.state.history.append(readings[index].tokens[-1])
    try:
        offers = proposer.propose(list(wants.values()), depth)
        for want in wants.values():
            want.state.keep_draft_q()
    finally:
        for want in wants.values():
            want.state.history.pop()
    return {index: offer for index, offer in zip(wants, offers, strict=True) if offer is not None}


def _want(span: Span, state: SequenceState, reading: Reading, probed: Tensor | None) -> Want | None:
    """None where no draft can be of use: the output ends with this step."""
    if span.num_drafts < 1 or not reading.tokens:
        return None
    left = state.request.max_tokens - (len(state.history) + 1 - state.num_prompt) - 1
    num_drafts = min(span.num_drafts, left)
    if num_drafts < 1 or not set(reading.tokens).isdisjoint(state.recipe.stop_ids):
        return None
    # The rows behind a rejected draft were asked about another text.
    is_whole = len(state.history) == span.start + len(span.tokens)
    return Want(span.seq_id, state, state.history, num_drafts, reading.tops, probed=probed if is_whole else None)

"""Rows that ride along in a step's forward beside the spans of its plan: questions to the model, not tokens.

A drafter that learns from the target's own forward (drafters/diffusion.py) appends them behind a sequence's rows. No
row of a plan sees them: they stand at later KV indices, and what they write there is scratch that the sequence's next
rows overwrite before anything reads it (R3). So they change no token, whatever they ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from scheduler.types import Span
from server.worker.sequences import SequenceState


class Probe(NamedTuple):
    """A span of rows that are asked, behind the plan's span `at`; of the same sequence, inside its pages."""

    at: int
    span: Span

    def rows(self, first_rows: Sequence[int], place: int) -> slice:
        """Its rows in the step, being the span `place` of those that ran."""
        return slice(first_rows[place], first_rows[place + 1])


class Prober(Protocol):
    """Who asks."""

    def probes(self, spans: Sequence[Span], states: Sequence[SequenceState]) -> Sequence[Probe]:
        """Rows to append to a step. A pure function of its arguments, so that a repeated step asks the same."""
        ...


def beside(spans: Sequence[Span], probes: Sequence[Probe]) -> Sequence[Span]:
    return [*spans, *(probe.span for probe in probes)] if probes else spans


def states_of(states: Sequence[SequenceState], probes: Sequence[Probe]) -> Sequence[SequenceState]:
    """The states of what `beside` gives."""
    return [*states, *(states[probe.at] for probe in probes)] if probes else states

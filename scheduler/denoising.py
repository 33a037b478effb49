"""The pass for denoise spans, between decodes and prompts: which run in a step, and how wide.

A step may be skipped by any of them without effect on its text. So decodes always go first, and while some run, denoise
rows are bounded by the time that it makes them wait (budget.py). What a row of a request yields is learned from its own
past.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from math import inf

from scheduler.budget import MIN_CHUNK, BudgetPolicy
from scheduler.decoding.auto_threshold import under_load
from scheduler.draft_plan import Backlog, DraftPlan
from scheduler.sequence import Sequence
from scheduler.span_offers import SpanOffer, buy_spans
from scheduler.types import Limits

_MOST_PASSED = 3
"""Steps in a row that may pass a sequence over because others yield more."""

_FIRST_YIELD = 0.2
_MEMORY = 0.9
_PRIOR_ROWS = 32.0


@dataclass(slots=True)
class DenoiseState:
    """What is known of a sequence's denoise spans.

    num_passed     steps in a row that went without it
    rows, tokens   of its past spans, older ones forgotten slowly
    """

    tokens: float
    rows: float = _PRIOR_ROWS
    num_passed: int = 0

    @property
    def yield_per_row(self) -> float:
        return self.tokens / self.rows

    def learn(self, rows: int, tokens: int) -> None:
        self.rows = _MEMORY * self.rows + rows
        self.tokens = _MEMORY * self.tokens + tokens


class Denoising:
    """Places denoise spans. One per scheduler; the state of each request is `Sequence.denoising`."""

    def __init__(self, limits: Limits, budget: BudgetPolicy) -> None:
        self._limits = limits
        self._budget = budget
        self._all = DenoiseState(_FIRST_YIELD * _PRIOR_ROWS)

    def place(self, draft: DraftPlan, seqs: Many[Sequence], backlog: Backlog | None) -> None:
        """Add the spans of this step to a plan that has its decodes."""
        if not seqs:
            return
        states = [seq.denoising or self._meet(seq) for seq in seqs]
        # Where nobody decodes there is no one to protect, and all that fit take part.
        most_passed = _MOST_PASSED if draft.num_decodes or draft.others.stream_s else 0
        offers = [_offer(seq, state, most_passed) for seq, state in zip(seqs, states, strict=True)]
        room = self._room(draft, offers, backlog)
        seconds, bound_s = self._prices(draft, seqs)
        rows = buy_spans(offers, draft.num_decodes, room, seconds, bound_s)
        fullness = max(0.0, 1.0 - sum(rows) / sum(offer.wide for offer in offers))
        for seq, state, offer, width in zip(seqs, states, offers, rows, strict=True):
            if not width:
                state.num_passed += 1
                continue
            state.num_passed = 0
            span = seq.decoding.next_span(width)
            if seq.request.decoding is not None:
                span = under_load(span, seq.request.decoding.selector, fullness)
            draft.place_denoise(seq, span, width * offer.yield_per_row)

    def _meet(self, seq: Sequence) -> DenoiseState:
        seq.denoising = DenoiseState(self._all.yield_per_row * _PRIOR_ROWS)
        return seq.denoising

    def _room(self, draft: DraftPlan, offers: Many[SpanOffer], backlog: Backlog | None) -> int:
        """Rows for denoise spans. Prompts keep what they need to go on, and half of a step that has no decodes; but
        somebody always denoises."""
        room = self._limits.max_batched_tokens - draft.num_decodes
        if backlog is None:
            return room
        kept = max(backlog.fewest, MIN_CHUNK if draft.num_decodes else room // 2)
        longest = max(offers, key=lambda offer: offer.num_passed)
        return max(room - min(backlog.tokens, kept), min(room, longest.narrow))

    def _prices(self, draft: DraftPlan, seqs: Many[Sequence]) -> tuple[Callable[[int, int], float], float]:
        """The time of the step with (spans, rows of them), and the longest it may be."""
        cost, features = self._budget.cost, draft.features
        mean = sum(seq.num_committed for seq in seqs) // len(seqs)
        joined = cost.span_curve(features, mean)
        if not draft.num_decodes and not draft.others.stream_s:
            return joined, inf
        streams = features._replace(
            tokens=features.tokens + len(seqs),
            decode_seqs=features.decode_seqs + len(seqs),
            context_tokens=features.context_tokens + len(seqs) * mean,
        )
        return joined, self._budget.denoise_bound_s(streams, draft.others)

    def learn(self, draft: DraftPlan) -> None:
        """Called when the outcomes were absorbed."""
        first = draft.num_decodes
        for row, before in enumerate(draft.lengths, first):
            seq, rows = draft.owners[row], len(draft.spans[row].tokens)
            state, tokens = seq.denoising, len(seq.tokens) - before
            if state is not None:
                state.learn(rows, tokens)
                self._all.learn(rows, tokens)


def _offer(seq: Sequence, state: DenoiseState, most_passed: int) -> SpanOffer:
    narrow, wide = seq.decoding.widths
    return SpanOffer(narrow, wide, state.yield_per_row, state.num_passed, state.num_passed >= most_passed)

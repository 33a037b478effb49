"""A step while it is being put together: spans, admissions, new pages, and what they will cost."""

from __future__ import annotations

from scheduler.sequence import Sequence
from scheduler.types import Admission, Span, StepFeatures


class DraftPlan:
    """Collects one step. `spans` and `owners` run in parallel."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.owners: list[Sequence] = []
        self.admitted: list[Admission] = []
        self.new_pages: list[tuple[int, tuple[int, ...]]] = []
        self.budget = 0
        self.num_decodes = 0
        self.num_prefill = 0
        self.num_recomputed = 0
        self.num_preempted = 0
        self.context_tokens = 0
        self.prefill_context = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def features(self) -> StepFeatures:
        rows = self.num_decodes + self.num_prefill
        return StepFeatures(rows, self.num_prefill, self.num_decodes, self.context_tokens, self.prefill_context)

    def place_prefill(self, seq: Sequence, num_tokens: int) -> None:
        """Add a chunk of at most `num_tokens` of a prompt."""
        span = seq.decoding.next_span(num_tokens)
        rows = len(span.tokens)
        self.spans.append(span)
        self.owners.append(seq)
        self.num_prefill += rows
        self.num_recomputed += max(0, min(span.kv_len, seq.high_water) - span.start)
        self.prefill_context += rows * span.start + rows * (rows + 1) // 2

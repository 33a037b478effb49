"""The first pass: every sequence that decodes, and the pages it needs, for which others may have to go."""

from __future__ import annotations

from scheduler.draft_plan import DraftPlan
from scheduler.kv_memory import KVMemory
from scheduler.queues import Queues
from scheduler.sequence import Sequence, Status


class Decodes:
    """Places decodes. Without state of its own."""

    def __init__(self, memory: KVMemory, queues: Queues) -> None:
        self._memory, self._queues = memory, queues

    def num_missing(self, running: list[Sequence]) -> int:
        """Pages that their next spans lack."""
        return sum(map(self._memory.num_missing, self._short(running)))

    def _short(self, running: list[Sequence]) -> list[Sequence]:
        memory, page_size = self._memory, self._memory.page_size
        # KVMemory.num_missing, written out: the call would cost a quarter of `schedule`.
        short = [s for s in running if s.prefill_end <= s.num_committed >= len(s.pages) * page_size]
        if self._queues.num_denoisers:
            short += [s for s in running if s.decoding.is_denoiser and memory.num_missing(s)]
        return short

    def place(self, draft: DraftPlan, running: list[Sequence], now: float) -> list[Sequence]:
        """Every decode, whatever the budget (R1), no drafts yet. Returns all others, oldest first: unfinished prompts,
        and those that denoise."""
        memory = self._memory
        if short := self._short(running):
            draft.num_preempted = self._preempt_for(sum(map(memory.num_missing, short)), now)
            for seq in short:
                if seq.status is Status.RUNNING:
                    for _ in range(memory.num_missing(seq)):
                        draft.add_page(seq.seq_id, memory.grow(seq))
        others = []
        spans, owners, context = draft.spans, draft.owners, 0
        for seq in running:
            if seq.num_committed < seq.prefill_end:
                others.append(seq)
                continue
            span = seq.decoding.next_span(1)
            spans.append(span)
            owners.append(seq)
            context += span.kv_len
        draft.num_decodes = len(spans)
        draft.context_tokens = context
        return others

    def _preempt_for(self, needed: int, now: float) -> int:
        """One wave: the last in order (lowest priority, then youngest) lose their pages until each decode, and each
        that denoises, has what its next span needs.

        It ends: the first sequence alone always fits, or `add` would have refused it.
        """
        num_preempted = 0
        while needed > self._memory.pool.num_available:
            needed -= self._memory.num_missing(self._queues.running[-1])
            self._queues.preempt_last(now)
            num_preempted += 1
        return num_preempted

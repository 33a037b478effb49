"""The passes for prompts: chunks of unfinished ones, then new requests, from the rows that the others left."""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.budget import MIN_CHUNK
from scheduler.chunks import chunk_size, least_chunk, share_out
from scheduler.draft_plan import Backlog, DraftPlan
from scheduler.kv_memory import KVMemory
from scheduler.queues import Queues
from scheduler.sequence import Sequence
from scheduler.types import Admission, Limits

MAX_JUDGED_ROWS = 256
"""Prompt rows judged in one step, over all requests with prompt_logprobs: their logits are [rows, vocabulary]."""

_MAX_DEFERRED = 64
"""Deferred requests one step looks at; beyond them the queue waits, so that `schedule` stays short."""


class Prefilling:
    """Places prompts, and admits requests. Without state of its own."""

    def __init__(self, limits: Limits, memory: KVMemory, queues: Queues) -> None:
        self._limits = limits
        self._memory = memory
        self._queues = queues

    def backlog(self, prefills: list[Sequence], may_admit: bool) -> Backlog:
        tokens = sum(seq.prefill_end - seq.num_committed for seq in prefills)
        waiting = self._queues.waiting
        running = len(self._queues.running)
        watermark = self._limits.watermark_pages if running else 0
        first = prefills[0] if prefills else waiting[0]
        if may_admit and running < self._limits.max_seqs and self._memory.fits(waiting[0], [], watermark):
            tokens += self._queues.num_queued_tokens
        num_prompts = len(prefills) + len(waiting)
        start = prefills[0].num_committed if prefills else 0
        return Backlog(tokens, start, num_prompts, least_chunk(first))

    def place(self, draft: DraftPlan, prefills: list[Sequence], may_admit: bool, now: float) -> None:
        """Add chunks of unfinished prompts, oldest first, then of new ones."""
        room = draft.budget - draft.num_decodes - draft.num_denoise - draft.num_drafts
        num_prompts = len(prefills) + (len(self._queues.waiting) if may_admit else 0)
        share = room if num_prompts <= 1 else max(MIN_CHUNK, int(room * self._limits.max_prefill_share))
        chunks: list[tuple[Sequence, int]] = []
        room, judged = share_out(prefills, chunks, room, share, MAX_JUDGED_ROWS)
        if may_admit and room:
            for seq in self._admissible(draft, now):
                before = room
                room, judged = share_out((seq,), chunks, room, share, judged)
                if not room or not judged or room == before:
                    break
        for seq, size in chunks:
            # What nobody else wanted goes to the oldest: the cap protects others, it does not waste a step.
            whole = size if seq.decoding.judges_prompt else chunk_size(seq, size + room, size + room)
            room -= whole - size
            draft.place_prefill(seq, whole)

    def _admissible(self, draft: DraftPlan, now: float) -> Iterator[Sequence]:
        """Admit waiting requests one by one, in order, while the caller has room for them.

        One that does not fit the memory, or the rows that everybody may need at once, is a barrier; one that waits for
        a running sibling's pages is passed over.
        """
        num_deferred = 0
        for seq in tuple(self._queues.waiting):
            num_running = len(self._queues.running)
            if num_running >= self._limits.max_seqs or num_deferred >= _MAX_DEFERRED or not self._has_rows(seq):
                return
            hits = self._memory.find_prefix(seq)
            if hits is None:
                num_deferred += 1
                continue
            if not self._memory.fits(seq, hits, self._limits.watermark_pages if num_running else 0):
                return
            self._queues.admit(seq, hits)
            if seq.admitted_s is None:
                seq.admitted_s = now
                seq.cached_tokens = min(seq.num_committed, len(seq.request.prompt))
                if self._memory.takes_hits(seq):
                    draft.prefix_queries += len(seq.tokens)
                    draft.prefix_hits += seq.num_committed
            draft.admitted.append(Admission(seq.seq_id, seq.request, tuple(seq.tokens)))
            draft.new_pages[seq.seq_id] = list(seq.pages)
            yield seq

    def _has_rows(self, seq: Sequence) -> bool:
        """Whether a step could hold a token of every sequence that decodes and, besides, the widest of those spans that
        cannot be cut (R1): otherwise decodes, which are never refused, could keep a denoising sequence out for ever."""
        queues = self._queues
        if not queues.num_denoisers and not seq.decoding.is_denoiser:
            return True
        everybody = [*queues.running, seq]
        rows = max((s.decoding.least_rows for s in everybody if s.decoding.is_denoiser), default=0)
        return rows + sum(not s.decoding.is_denoiser for s in everybody) <= self._limits.max_batched_tokens

"""The scheduler: which tokens of which sequences are computed in the next step, and what their outcomes mean.

Readable top to bottom: add, abort, schedule (three passes under one token budget), update. No clock, no I/O, no
tensors, no threads; time enters as an argument (R6). One plan is in flight at a time: schedule, run, update, in this
order.

Source: Sarathi-Serve (Agrawal et al., OSDI 2024), Algorithm 3, with vLLM v1's recompute preemption and prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.admission import check_limits, refuse_impossible, refuse_overload
from scheduler.budget import MIN_CHUNK, StepPolicy
from scheduler.chunks import share_out
from scheduler.decoding.autoregressive import Autoregressive
from scheduler.decoding.base import BadOutcome
from scheduler.draft_plan import ALONE, Backlog, DraftPlan, Others
from scheduler.drafting import make_step_policy
from scheduler.kv_memory import KVMemory
from scheduler.queues import Queues
from scheduler.reports import make_delta, step_stats
from scheduler.sequence import Sequence, Status
from scheduler.step_cost import StepCost
from scheduler.types import (
    Admission,
    Delta,
    Fault,
    FinishReason,
    Limits,
    Outcome,
    Request,
    Span,
    SpeculationSettings,
    StepPlan,
    StepResult,
    StepStats,
)

MAX_JUDGED_ROWS = 256
"""Prompt rows judged in one step, over all requests with prompt_logprobs: their logits are [rows, vocabulary]."""

_MAX_DEFERRED = 64
"""Deferred requests one step looks at; beyond them the queue waits, so that `schedule` stays short."""


class Scheduler:
    """Continuous batching of autoregressive requests over one paged KV pool.

    cost         the step-time model, seeded by profile samples if there are any; it goes on learning in `update`
    root         root of the prefix names; tests only
    speculation  how drafts are bought; None = no drafter is ever asked
    Raises ValueError for limits under which the rules cannot be kept, and for settings that contradict themselves.
    """

    def __init__(
        self,
        limits: Limits,
        cost: StepCost | None = None,
        root: bytes | None = None,
        speculation: SpeculationSettings | None = None,
    ) -> None:
        check_limits(limits)
        self.limits = limits
        self._memory = KVMemory(limits.num_pages, limits.page_size, limits.enable_prefix_caching, root)
        self._queues = Queues(self._memory)
        self._policy = make_step_policy(limits, StepCost() if cost is None else cost, self._memory, speculation)
        self._in_flight: DraftPlan | None = None
        self._num_arrived = 0
        self._step = 0
        self._now = 0.0

    @property
    def policy(self) -> StepPolicy:
        return self._policy

    @property
    def has_work(self) -> bool:
        return bool(self._queues.by_id) or self._in_flight is not None

    def add(self, request: Request, now: float, is_resubmission: bool = False) -> Fault | None:
        """Queue a request. Returns why it is refused: 400 if it can never run, 429 if the queue is full."""
        self._now = now
        queues = self._queues
        if request.id in queues.by_id:
            return Fault(400, f"request id {request.id!r} is in use", "id")
        seats = max(0, self.limits.max_seqs - queues.num_running)
        fault = refuse_impossible(request, self.limits)
        if fault is None and not is_resubmission:
            fault = refuse_overload(request, self.limits, len(queues.waiting), seats, queues.num_queued_tokens)
        if fault is not None:
            return fault
        self._num_arrived += 1
        seq = Sequence(request, (request.priority, self._num_arrived), now, [*request.prompt, *request.output])
        seq.decoding = Autoregressive(seq, self.limits.max_model_len)
        queues.by_id[request.id] = seq
        queues.enqueue(seq, now)
        return None

    def abort(self, request_id: str) -> None:
        """End a request without a delta, at any moment. Unknown ids are ignored, and so is its outcome in flight."""
        seq = self._queues.by_id.get(request_id)
        if seq is not None:
            self._end(seq)

    def fail(self, request_id: str, fault: Fault) -> Delta | None:
        """End a request with an error. None if it is not here (any more)."""
        seq = self._queues.by_id.get(request_id)
        if seq is None:
            return None
        seq.finish_reason = FinishReason.ERROR
        self._end(seq)
        return make_delta(seq, self._now, fault=fault)

    def _end(self, seq: Sequence) -> None:
        self._queues.end(seq)
        if self._in_flight is None:
            self._queues.bury()

    def schedule(self, now: float, others: Others = ALONE) -> StepPlan | None:
        """The next step, or None; `others` take turns with us. Raises RuntimeError while a plan is in flight."""
        if self._in_flight is not None:
            raise RuntimeError(f"step {self._step} is in flight; update() must come before schedule()")
        self._now = now
        if not self._queues.by_id:
            return None
        draft = DraftPlan(others)
        prefills = self._place_decodes(draft)
        may_admit = bool(self._queues.waiting) and not draft.num_preempted
        backlog = self._backlog(prefills, may_admit) if prefills or may_admit else None
        self._policy.shape(draft, backlog)
        if backlog is not None:
            self._place_prefills(draft, prefills, may_admit)
        self._policy.finish(draft)
        assert draft.spans, "a step with work to do has no spans (forward progress)"
        self._step += 1
        self._in_flight = draft
        return StepPlan(
            step=self._step,
            spans=tuple(draft.spans),
            admitted=tuple(draft.admitted),
            new_pages=draft.take_pages(),
            released=self._queues.take_released(),
            budget=draft.budget,
            predicted_s=self._policy.predict(draft),
            draft_depth=draft.draft_depth,
        )

    def _place_decodes(self, draft: DraftPlan) -> list[Sequence]:
        """Pass 1: every decode, whatever the budget (R1), no drafts yet. Returns unfinished prompts, oldest first."""
        memory = self._memory
        page_size = memory.page_size
        # KVMemory.is_short, written out: the call would cost a quarter of `schedule`.
        short = [s for s in self._queues.running if s.prefill_end <= s.num_committed >= len(s.pages) * page_size]
        if short:
            draft.num_preempted = self._preempt_for(len(short))
            for seq in short:
                if seq.status is Status.RUNNING:
                    draft.add_page(seq.seq_id, memory.grow(seq))
        prefills = []
        spans, owners, context = draft.spans, draft.owners, 0
        for seq in self._queues.running:
            if seq.num_committed < seq.prefill_end:
                prefills.append(seq)
                continue
            span = seq.decoding.next_span(1)
            spans.append(span)
            owners.append(seq)
            context += span.kv_len
        draft.num_decodes = len(spans)
        draft.context_tokens = context
        return prefills

    def _preempt_for(self, needed: int) -> int:
        """One wave: the last in order (lowest priority, then youngest) lose their pages until each decode has one.

        It ends: the first sequence alone always fits, or `add` would have refused it.
        """
        num_preempted = 0
        while needed > self._memory.pool.num_available:
            needed -= self._memory.is_short(self._queues.running[-1])
            self._queues.preempt_last(self._now)
            num_preempted += 1
        return num_preempted

    def _backlog(self, prefills: list[Sequence], may_admit: bool) -> Backlog:
        tokens = sum(seq.prefill_end - seq.num_committed for seq in prefills)
        running = len(self._queues.running)
        watermark = self.limits.watermark_pages if running else 0
        if may_admit and running < self.limits.max_seqs and self._memory.fits(self._queues.waiting[0], [], watermark):
            tokens += self._queues.num_queued_tokens
        num_prompts = len(prefills) + len(self._queues.waiting)
        return Backlog(tokens, prefills[0].num_committed if prefills else 0, num_prompts)

    def _place_prefills(self, draft: DraftPlan, prefills: list[Sequence], may_admit: bool) -> None:
        """Passes 2 and 3: chunks of unfinished prompts, oldest first, then of new ones, from what decodes left."""
        room = draft.budget - draft.num_decodes - draft.num_drafts
        num_prompts = len(prefills) + (len(self._queues.waiting) if may_admit else 0)
        share = room if num_prompts <= 1 else max(MIN_CHUNK, int(room * self.limits.max_prefill_share))
        chunks: list[tuple[Sequence, int]] = []
        room, judged = share_out(prefills, chunks, room, share, MAX_JUDGED_ROWS)
        if may_admit and room:
            for seq in self._admissible(draft):
                room, judged = share_out((seq,), chunks, room, share, judged)
                if not room or not judged:
                    break
        for seq, size in chunks:
            # What nobody else wanted goes to the oldest: the cap protects others, it does not waste a step.
            extra = 0 if seq.decoding.judges_prompt else min(room, seq.prefill_end - seq.num_committed - size)
            room -= extra
            draft.place_prefill(seq, size + extra)

    def _admissible(self, draft: DraftPlan) -> Iterator[Sequence]:
        """Admit waiting requests one by one, in order, while the caller has room for them.

        One that does not fit the memory is a barrier; one that waits for a running sibling's pages is passed over.
        """
        num_deferred = 0
        for seq in tuple(self._queues.waiting):
            num_running = len(self._queues.running)
            if num_running >= self.limits.max_seqs or num_deferred >= _MAX_DEFERRED:
                return
            hits = self._memory.find_prefix(seq)
            if hits is None:
                num_deferred += 1
                continue
            if not self._memory.fits(seq, hits, self.limits.watermark_pages if num_running else 0):
                return
            self._queues.admit(seq, hits)
            if seq.admitted_s is None:
                seq.admitted_s = self._now
                seq.cached_tokens = min(seq.num_committed, len(seq.request.prompt))
                if self._memory.takes_hits(seq):
                    draft.prefix_queries += len(seq.tokens)
                    draft.prefix_hits += seq.num_committed
            draft.admitted.append(Admission(seq.seq_id, seq.request, tuple(seq.tokens)))
            draft.new_pages[seq.seq_id] = list(seq.pages)
            yield seq

    def update(self, plan: StepPlan, result: StepResult, now: float) -> tuple[list[Delta], StepStats]:
        """Learn what the step in flight gave. Raises ValueError, having changed nothing, if it is another step's."""
        draft = self._in_flight
        if draft is None or not plan.step == result.step == self._step:
            raise ValueError(f"result of step {result.step} for plan {plan.step}, but step {self._step} is due")
        if [span.seq_id for span in draft.spans] != [outcome.seq_id for outcome in result.outcomes]:
            raise ValueError(f"the outcomes of step {plan.step} are not one per span, in the order of its spans")
        self._now = now
        deltas: list[Delta] = []
        has_failed = False
        for seq, span, outcome in zip(draft.owners, draft.spans, result.outcomes, strict=True):
            has_failed = has_failed or outcome.error is not None
            if seq.status is not Status.RUNNING:
                continue
            delta = self._absorb(seq, span, outcome)
            if delta is not None:
                deltas.append(delta)
        self._in_flight = None
        self._queues.bury()
        # A step with a failed row may have been run several times to find it; its time says nothing.
        report = self._policy.learn(draft, result, is_timed=not has_failed)
        generated = sum(len(delta.tokens) for delta in deltas)
        return deltas, step_stats(self.stats(), draft, result, plan.predicted_s, generated, report)

    def _absorb(self, seq: Sequence, span: Span, outcome: Outcome) -> Delta | None:
        try:
            if outcome.error is not None:
                raise BadOutcome(outcome.error)
            news = seq.decoding.absorb(span, outcome)
        except BadOutcome as error:
            seq.finish_reason = FinishReason.ERROR
            self._queues.end(seq)
            return make_delta(seq, self._now, fault=Fault(500, str(error)))
        if seq.num_committed - seq.num_entered * self._memory.page_size >= self._memory.page_size:
            self._memory.publish(seq)
        if seq.finish_reason is None and not news.tokens and not news.prompt_logprobs:
            return None
        if news.tokens and seq.first_token_s is None:
            seq.first_token_s = self._now
        if seq.finish_reason is not None:
            self._queues.end(seq)
        return make_delta(seq, self._now, news)

    def stats(self) -> StepStats:
        """The gauges as they are now; counts are 0."""
        pool = self._memory.pool
        return StepStats(
            step=self._step,
            num_running=self._queues.num_running,
            num_waiting=len(self._queues.waiting),
            pages_used=pool.num_owned,
            pages_cached=pool.num_idle,
            pages_total=pool.num_pages,
            oldest_waiting_s=max((self._now - seq.waiting_since_s for seq in self._queues.waiting), default=0.0),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError if the bookkeeping contradicts itself (R2, R3, the queues). For tests; O(state)."""
        self._queues.check()

"""The scheduler: which tokens of which sequences are computed in the next step, and what their outcomes mean.

Readable top to bottom: add, abort, schedule (four passes under one token budget), update. No clock, no I/O, no
tensors, no threads; time enters as an argument (R6). One plan is in flight at a time: schedule, run, update, in this
order. A second one may join it where it can be told what the first will leave: `schedule_ahead`.

Source: Sarathi-Serve (Agrawal et al., OSDI 2024), Algorithm 3, with vLLM v1's recompute preemption and prefix cache.
"""

from __future__ import annotations

from dataclasses import replace

from scheduler.admission import check_limits, refuse_impossible, refuse_overload
from scheduler.budget import BudgetPolicy, StepPolicy
from scheduler.decodes import Decodes
from scheduler.decoding.base import BadOutcome
from scheduler.decoding.factory import make_decoding, refuse_decoding
from scheduler.denoising import Denoising
from scheduler.draft_plan import ALONE, DraftPlan, Others
from scheduler.drafting import make_step_policy
from scheduler.foresight import Flight, foreseen, without_surplus
from scheduler.kv_memory import KVMemory
from scheduler.prefilling import Prefilling
from scheduler.prompt_attention import check_methods
from scheduler.queues import Queues
from scheduler.reports import make_delta, step_stats
from scheduler.sequence import Sequence, Status
from scheduler.step_cost import StepCost
from scheduler.types import (
    AttentionOffer,
    Delta,
    DiffusionModel,
    Fault,
    FinishReason,
    Limits,
    Outcome,
    PromptMethod,
    Request,
    Span,
    SpeculationSettings,
    StepPlan,
    StepResult,
    StepStats,
)


class Scheduler:
    """Continuous batching of autoregressive and diffusion requests over one paged KV pool.

    cost         the step-time model, seeded by profile samples if there are any; it goes on learning in `update`
    root         root of the prefix names; tests only
    speculation  how drafts are bought; None = no drafter is ever asked
    diffusion    how the model denoises; None = it cannot
    attention, prompt_attention   the sparse methods that requests may choose
    Raises ValueError for limits under which the rules cannot be kept, and for settings that contradict themselves.
    """

    def __init__(
        self,
        limits: Limits,
        cost: StepCost | None = None,
        root: bytes | None = None,
        speculation: SpeculationSettings | None = None,
        diffusion: DiffusionModel | None = None,
        attention: tuple[AttentionOffer, ...] = (),
        prompt_attention: tuple[PromptMethod, ...] = (),
    ) -> None:
        check_limits(limits, diffusion)
        check_methods(prompt_attention, limits)
        self.limits = limits
        self._diffusion, self._attention, self._prompt_attention = diffusion, attention, prompt_attention
        self._memory = KVMemory(limits.num_pages, limits.page_size, limits.enable_prefix_caching, root)
        self._queues = Queues(self._memory)
        budget = BudgetPolicy(limits, StepCost() if cost is None else cost)
        self._policy = make_step_policy(budget, limits, self._memory, speculation)
        self._denoising = Denoising(limits, budget)
        self._decodes = Decodes(self._memory, self._queues)
        self._prefilling = Prefilling(limits, self._memory, self._queues)
        self._in_flight: list[Flight] = []
        self._before: DraftPlan | None = None
        self._num_arrived = 0
        self._step = 0
        self._now = 0.0

    @property
    def policy(self) -> StepPolicy:
        return self._policy

    @property
    def has_work(self) -> bool:
        return bool(self._queues.by_id) or bool(self._in_flight)

    def add(self, request: Request, now: float, is_resubmission: bool = False) -> Fault | None:
        """Queue a request. Returns why it is refused: 400 if it can never run, 429 if the queue is full."""
        self._now = now
        queues = self._queues
        if request.id in queues.by_id:
            return Fault(400, f"request id {request.id!r} is in use", "id")
        seats = max(0, self.limits.max_seqs - queues.num_running)
        fault = refuse_impossible(request, self.limits, self._attention, self._prompt_attention)
        fault = fault or refuse_decoding(request, self.limits, self._diffusion)
        if fault is None and not is_resubmission:
            fault = refuse_overload(request, self.limits, len(queues.waiting), seats, queues.num_queued_tokens)
        if fault is not None:
            return fault
        self._num_arrived += 1
        seq = Sequence(request, (request.priority, self._num_arrived), now, [*request.prompt, *request.output])
        seq.decoding = make_decoding(seq, self.limits, self._diffusion)
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
        """Its pages are its own until the last step that may write them is over."""
        steps = [flight.step for flight in self._in_flight if seq in flight.draft.owners]
        self._queues.end(seq, max(steps, default=self._step))
        if not self._in_flight:
            self._queues.bury(self._step)

    def schedule(self, now: float, others: Others = ALONE) -> StepPlan | None:
        """The next step, or None; `others` take turns with us. Raises RuntimeError while a plan is in flight."""
        if self._in_flight:
            raise RuntimeError(f"step {self._step} is in flight; update() must come before schedule()")
        self._now = now
        if not self._queues.by_id:
            return None
        return self._compose(DraftPlan(others, now, self._host_s(others)), self._queues.running)

    def schedule_ahead(self, now: float) -> StepPlan | None:
        """The step after the one in flight, before that one's tokens are known: `UNKNOWN` stands for them. None where
        it cannot be told what the step leaves, where nobody goes on, and where it would take a preemption.

        A sequence that the step in flight turns out to end has a row too many: its outcome is passed over.
        """
        if len(self._in_flight) != 1 or self._queues.num_denoisers:
            return None
        self._now, before = now, self._in_flight[0]
        with foreseen(before, self._queues.running) as running:
            if not running or self._decodes.num_missing(running) > self._memory.pool.num_available:
                return None
            # Nothing is between two steps of which one was planned while the other ran.
            host_s = 0.0 if before.is_ahead else None
            return self._compose(DraftPlan(ALONE, now, host_s), running, after=before.step)

    def _compose(self, draft: DraftPlan, running: list[Sequence], after: int | None = None) -> StepPlan:
        """The passes, over the sequences that go on. after: the step in flight."""
        prefills = self._decodes.place(draft, running, self._now)
        denoisers: list[Sequence] = []
        if self._queues.num_denoisers:
            denoisers = [seq for seq in prefills if seq.decoding.is_denoising]
            prefills = [seq for seq in prefills if not seq.decoding.is_denoising]
        may_admit = bool(self._queues.waiting) and not draft.num_preempted
        backlog = self._prefilling.backlog(prefills, may_admit) if prefills or may_admit else None
        self._denoising.place(draft, denoisers, backlog)
        self._policy.shape(draft, backlog)
        if backlog is not None:
            self._prefilling.place(draft, prefills, may_admit, self._now)
        self._policy.finish(draft)
        assert draft.spans, "a step with work to do has no spans (forward progress)"
        self._step += 1
        self._in_flight.append(Flight(self._step, draft, after is not None))
        return StepPlan(
            step=self._step,
            spans=tuple(draft.spans),
            admitted=tuple(draft.admitted),
            new_pages=draft.take_pages(),
            released=self._queues.take_released(),
            budget=draft.budget,
            predicted_s=self._policy.predict(draft),
            draft_depth=draft.draft_depth,
            after=after,
        )

    def _host_s(self, others: Others) -> float | None:
        """Seconds from the last plan to this one that were not the worker's, if nobody else had any of them."""
        before = self._before
        if before is None or others.num or before.others.num:
            return None
        return self._now - before.planned_at_s - before.elapsed_s

    def update(self, plan: StepPlan, result: StepResult, now: float) -> tuple[list[Delta], StepStats]:
        """Learn what the step in flight gave. Raises ValueError, having changed nothing, if it is another step's."""
        due = self._in_flight[0].step if self._in_flight else None
        if not plan.step == result.step == due:
            raise ValueError(f"result of step {result.step} for plan {plan.step}, but step {due} is due")
        flight = self._in_flight[0]
        draft = flight.draft
        if [span.seq_id for span in draft.spans] != [outcome.seq_id for outcome in result.outcomes]:
            raise ValueError(f"the outcomes of step {plan.step} are not one per span, in the order of its spans")
        self._now = now
        deltas: list[Delta] = []
        has_failed = False
        is_over = [seq.status is not Status.RUNNING for seq in draft.owners] if flight.is_ahead else []
        for seq, span, outcome in zip(draft.owners, draft.spans, result.outcomes, strict=True):
            has_failed = has_failed or outcome.error is not None
            if seq.status is not Status.RUNNING:
                continue
            delta = self._absorb(seq, span, outcome)
            if delta is not None:
                deltas.append(delta)
        del self._in_flight[0]
        draft.elapsed_s, num_surplus = result.elapsed_s, 0
        if flight.is_ahead:
            result, num_surplus = without_surplus(draft, result, is_over)
        # Without work the engine waits.
        self._before = draft if self._queues.by_id and not flight.is_ahead else None
        if draft.num_denoising:
            self._denoising.learn(draft)
        self._queues.bury(flight.step)
        # A step with a failed row may have been run several times to find it; its time says nothing.
        report = self._policy.learn(draft, result, is_timed=not has_failed)
        generated = sum(len(delta.tokens) for delta in deltas)
        stats = step_stats(self.stats(), draft, result, plan.predicted_s, generated, report)
        return deltas, replace(stats, is_ahead=True, num_surplus=num_surplus) if flight.is_ahead else stats

    def _absorb(self, seq: Sequence, span: Span, outcome: Outcome) -> Delta | None:
        try:
            if outcome.error is not None:
                raise BadOutcome(outcome.error)
            news = seq.decoding.absorb(span, outcome)
        except BadOutcome as error:
            seq.finish_reason = FinishReason.ERROR
            self._end(seq)
            return make_delta(seq, self._now, fault=Fault(500, str(error)))
        if seq.num_committed - seq.num_entered * self._memory.page_size >= self._memory.page_size:
            self._memory.publish(seq)
        if seq.finish_reason is None and not news.tokens and not news.prompt_logprobs and news.snapshot is None:
            return None
        if news.tokens and seq.first_token_s is None:
            seq.first_token_s = self._now
        if seq.finish_reason is not None:
            self._end(seq)
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

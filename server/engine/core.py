"""EngineCore: one worker, one scheduler, one step at a time. The same class in the engine process and in-process.

It owns what joins the two: grammars compiled beside the loop, the isolation of a request that makes a step raise, and
which sequence belongs to which request. It does not know how requests arrive or where deltas go.
All methods belong to one thread, the loop's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from scheduler.budget import StepPolicy
from scheduler.draft_plan import ALONE, Others
from scheduler.types import Delta, Fault, FinishReason, Request, StepPlan, StepResult, StepStats
from server.engine.isolation import Failure
from server.engine.patience import Patience
from server.engine.preparation import Preparation
from server.engine.under_way import UnderWay


class WorkerLike(Protocol):
    """What the loop asks of a worker (`server/worker/worker.py`)."""

    @property
    def is_asynchronous(self) -> bool: ...
    def prepare(self, request: Request) -> None: ...
    def run(self, plan: StepPlan) -> StepResult: ...
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]: ...
    def forget(self, request_id: str) -> None: ...
    def close(self) -> None: ...


class SchedulerLike(Protocol):
    """What the loop asks of a scheduler (`scheduler/scheduler.py`)."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request, now: float, is_resubmission: bool = False) -> Fault | None: ...
    def abort(self, request_id: str) -> None: ...
    @property
    def policy(self) -> StepPolicy: ...
    def schedule(self, now: float, others: Others = ALONE) -> StepPlan | None: ...
    def schedule_ahead(self, now: float) -> StepPlan | None: ...
    def update(self, plan: StepPlan, result: StepResult, now: float) -> tuple[list[Delta], StepStats]: ...
    def fail(self, request_id: str, fault: Fault) -> Delta | None: ...
    def stats(self) -> StepStats: ...


class EngineCore:
    """Requests in, deltas out.

    clock  monotonic seconds
    wake   called from another thread when a compiled grammar is waiting to be taken up
    queue_timeout_s  a request that no step has touched for so long fails with 503; None = it may wait for ever
    plans_ahead  the worker takes a step before the one before it is over
    """

    def __init__(
        self,
        worker: WorkerLike,
        scheduler: SchedulerLike,
        clock: Callable[[], float] = time.monotonic,
        grammar_timeout_s: float = 5.0,
        wake: Callable[[], None] = lambda: None,
        queue_timeout_s: float | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self._worker, self._scheduler, self._clock = worker, scheduler, clock
        self._preparation = Preparation(worker.prepare, worker.forget, clock, grammar_timeout_s, wake)
        self._prepared: set[str] = set()
        self._patience = Patience(queue_timeout_s)
        self._resubmitted: set[str] = set()
        self._request_of: dict[int, str] = {}
        self._steps, self._plans_ahead = UnderWay(worker, clock), plans_ahead
        self._outbox: list[Delta] = []

    @property
    def has_work(self) -> bool:
        """A step, a delta or a compilation is due."""
        return bool(self._outbox) or self._scheduler.has_work or len(self._preparation) > 0

    @property
    def is_preparing(self) -> bool:
        return len(self._preparation) > 0

    @property
    def stream_s(self) -> float:
        """Predicted seconds of the last step's decodes by themselves; 0 = there were none, or nothing is known yet."""
        return self._scheduler.policy.stream_s

    def stats(self) -> StepStats:
        return self._scheduler.stats()

    def close(self) -> None:
        """Let the worker keep what is to outlive it. The last call."""
        self._worker.close()

    def add(self, request: Request, is_resubmission: bool = False) -> None:
        """Take a request; what is wrong with it comes out as a delta."""
        if is_resubmission:
            self._resubmitted.add(request.id)
        if not request.output:
            self._patience.add(request.id, self._clock())
        if request.sampling.grammar is None:
            if (problem := self._undenoisable(request)) is None:
                self._enter(request)
            else:
                self._refuse(request.id, problem)
                self._release(request.id)
        elif (fault := self._preparation.add(request)) is not None:
            self._refuse(request.id, fault)

    def abort(self, request_id: str) -> None:
        """Forget a request, wherever it is. Idempotent, no delta follows."""
        self._outbox = [delta for delta in self._outbox if delta.request_id != request_id]
        if not self._preparation.abort(request_id):
            self._scheduler.abort(request_id)
        self._release(request_id)

    def plan(self, others: Others = ALONE) -> StepPlan | None:
        """What the next step does, or None; compiled grammars have joined the queue, the impatient have left it.

        others  the engine's other models that have work (`several.py`)
        """
        self._take_up()
        return self._scheduler.schedule(self._clock(), others)

    def _take_up(self) -> None:
        for request, fault in self._preparation.collect():
            if fault is None:
                self._prepared.add(request.id)
                self._enter(request)
            else:
                self._worker.forget(request.id)
                self._refuse(request.id, fault)
        for request_id in self._patience.expired(self._clock()):
            self._give_up(request_id)

    def take_outbox(self) -> list[Delta]:
        """Deltas that no step made: refusals."""
        out, self._outbox = self._outbox, []
        return out

    @property
    def is_asynchronous(self) -> bool:
        """There is time between `launch` and `collect` for other work: the device computes beside the host."""
        return self._worker.is_asynchronous

    @property
    def under_way(self) -> StepPlan | None:
        """The step that `collect` will end; None = nothing was launched that is not over."""
        return self._steps.plan

    def launch_ahead(self) -> None:
        """Plan and launch the step behind the one that is under way, where it can be told now."""
        if self._plans_ahead and self._steps.may_follow:
            self._take_up()
            plan = self._scheduler.schedule_ahead(self._clock())
            if plan is not None:
                self.launch(plan)

    def launch(self, plan: StepPlan) -> None:
        """Begin the step. What goes wrong comes out of `collect`; until then requests may come and go."""
        for seq_id in plan.released:
            self._request_of.pop(seq_id, None)
        for admission in plan.admitted:
            self._request_of[admission.seq_id] = admission.request.id
            self._patience.forget(admission.request.id)
        self._steps.launch(plan)

    def collect(self) -> tuple[list[Delta], StepStats]:
        """End the step that was launched first. Raises what isolation cannot pin on a request: then the engine must
        end."""
        plan, result, failures = self._steps.collect()
        failed = [delta for failure in failures if (delta := self._fail(failure)) is not None]
        deltas, stats = self._scheduler.update(plan, result, self._clock())
        # A failed sequence has left the scheduler: whatever `update` still says of it would be a second end.
        done = {delta.request_id for delta in failed}
        deltas = failed + [delta for delta in deltas if delta.request_id not in done]
        for delta in deltas:
            if delta.finish_reason is not None:
                self._release(delta.request_id)
        return deltas, stats

    def drain(self) -> None:
        """End what is under way, if nobody listens any more."""
        while self.under_way is not None:
            self.collect()

    def execute(self, plan: StepPlan) -> tuple[list[Delta], StepStats]:
        """Both halves of a step, one after the other."""
        self.launch(plan)
        return self.collect()

    def step(self) -> tuple[list[Delta], StepStats | None]:
        """Plan and run one step, and launch the one behind it; (deltas, None) if there was nothing to run."""
        if self.under_way is None and (plan := self.plan()) is not None:
            self.launch(plan)
        deltas = self.take_outbox()
        if self.under_way is None:
            return deltas, None
        self.launch_ahead()
        more, stats = self.collect()
        return deltas + more, stats

    def _undenoisable(self, request: Request) -> Fault | None:
        """Why this model cannot denoise as asked. Nothing is compiled for that, so it need not leave the loop."""
        if request.decoding is not None:
            try:
                self._worker.prepare(request)
            except ValueError as problem:
                return Fault(400, str(problem), "decoding")
        return None

    def _enter(self, request: Request) -> None:
        fault = self._scheduler.add(request, self._clock(), request.id in self._resubmitted)
        self._resubmitted.discard(request.id)
        if fault is not None:
            self._refuse(request.id, fault)
            self._release(request.id)

    def _give_up(self, request_id: str) -> None:
        """End a request that no step has touched; wherever it waits, for a place or for its grammar."""
        fault = Fault(503, f"no place was free within {self._patience.timeout_s:g} s; try again later", None, "timeout")
        if self._preparation.abort(request_id):
            self._refuse(request_id, fault)
        elif (delta := self._scheduler.fail(request_id, fault)) is not None:
            self._outbox.append(delta)
        self._release(request_id)

    def _refuse(self, request_id: str, fault: Fault) -> None:
        self._patience.forget(request_id)
        self._outbox.append(Delta(request_id, finish_reason=FinishReason.ERROR, fault=fault))

    def _fail(self, failure: Failure) -> Delta | None:
        return self._scheduler.fail(self._request_of[failure.seq_id], failure.fault)

    def _release(self, request_id: str) -> None:
        self._patience.forget(request_id)
        self._resubmitted.discard(request_id)
        if request_id in self._prepared:
            self._prepared.discard(request_id)
            self._worker.forget(request_id)

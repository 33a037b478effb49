"""SeveralCores: two or more models in one engine, one step at a time. To the loop it is what an `EngineCore` is.

Each model has a worker, a KV pool, a scheduler and a step-time model of its own; what they share is the machine's time.
The model that has used least of it goes next, so each gets an equal part while it has work, and one without work costs
nothing. Each scheduler is told what the others' streams need (`Others`), so that a step of each fits one target.
All methods belong to one thread, the loop's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from scheduler.draft_plan import Others
from scheduler.types import Delta, Fault, FinishReason, Request, StepPlan, StepStats
from server.engine.core import EngineCore


class _Turn:
    """A model in the round.

    used_s    step time it has used, on a scale on which it cannot save up what it leaves while it has nothing to do
    last_s    of its last step
    stream_s  predicted, of the decodes of its last step; 0 once it has had nothing to do
    is_busy   it had work when somebody last looked
    """

    def __init__(self, name: str, core: EngineCore) -> None:
        self.name, self.core = name, core
        self.used_s = self.last_s = self.stream_s = 0.0
        self.is_busy = False


class SeveralCores:
    """Requests in, deltas out, by `Request.model`.

    cores  by name; a request that names none of them fails with 404
    clock  monotonic seconds
    """

    def __init__(self, cores: Mapping[str, EngineCore], clock: Callable[[], float] = time.monotonic) -> None:
        self._turns = [_Turn(name, core) for name, core in cores.items()]
        self._clock = clock
        self._planned: _Turn | None = None
        self._launched_at = 0.0
        self._outbox: list[Delta] = []

    @property
    def has_work(self) -> bool:
        return bool(self._outbox) or any(turn.core.has_work for turn in self._turns)

    def close(self) -> None:
        """Let the workers keep what is to outlive them. The last call."""
        for turn in self._turns:
            turn.core.close()

    def add(self, request: Request, is_resubmission: bool = False) -> None:
        """Take a request; what is wrong with it comes out as a delta."""
        for turn in self._turns:
            if turn.name == request.model:
                turn.core.add(request, is_resubmission)
                return
        fault = Fault(404, f"this engine has no model {request.model!r}", "model")
        self._outbox.append(Delta(request.id, finish_reason=FinishReason.ERROR, fault=fault))

    def abort(self, request_id: str) -> None:
        """Forget a request, wherever it is. Idempotent, no delta follows."""
        self._outbox = [delta for delta in self._outbox if delta.request_id != request_id]
        for turn in self._turns:
            turn.core.abort(request_id)

    def plan(self) -> StepPlan | None:
        """The next step of the model whose turn it is, or None if none has anything to run."""
        busy = self._busy()
        for turn in sorted(busy, key=self._place) if len(busy) > 1 else busy:
            others = [other.stream_s for other in busy if other is not turn]
            plan = turn.core.plan(Others(len(others), sum(others)))
            if plan is not None:
                self._planned = turn
                return plan
        return None

    def take_outbox(self) -> list[Delta]:
        """Deltas that no step made: refusals."""
        out, self._outbox = self._outbox, []
        for turn in self._turns:
            out += turn.core.take_outbox()
        return out

    @property
    def is_asynchronous(self) -> bool:
        """As `EngineCore.is_asynchronous`, of the models together: they are on one device."""
        return any(turn.core.is_asynchronous for turn in self._turns)

    @property
    def under_way(self) -> StepPlan | None:
        """As `EngineCore.under_way`: one model's at a time."""
        return None if self._planned is None else self._planned.core.under_way

    def launch_ahead(self) -> None:
        """As `EngineCore.launch_ahead`, unless it is another model's turn next."""
        if self._planned is not None and not any(t.core.has_work for t in self._turns if t is not self._planned):
            self._planned.core.launch_ahead()

    def launch(self, plan: StepPlan) -> None:
        """Begin the step; as `EngineCore.launch`."""
        assert self._planned is not None, "launch() follows plan()"
        self._launched_at = self._clock()
        self._planned.core.launch(plan)

    def collect(self) -> tuple[list[Delta], StepStats]:
        """End the step. Raises what isolation cannot pin on a request: then the engine must end."""
        turn = self._planned
        assert turn is not None, "collect() follows launch()"
        deltas, stats = turn.core.collect()
        # A step that was launched ahead has the time from here on.
        started_at, self._launched_at = self._launched_at, self._clock()
        turn.last_s = self._launched_at - started_at
        turn.used_s += turn.last_s
        turn.stream_s = turn.core.stream_s if turn.core.has_work else 0.0
        return deltas, replace(stats, model=turn.name)

    def execute(self, plan: StepPlan) -> tuple[list[Delta], StepStats]:
        """Both halves of a step, one after the other."""
        self.launch(plan)
        return self.collect()

    def _place(self, turn: _Turn) -> float:
        """Least goes first. Two steps in a row only make up for half of one: equal models alternate, noise or not."""
        return turn.used_s + (0.5 * turn.last_s if turn is self._planned else 0.0)

    def _busy(self) -> list[_Turn]:
        """The models that have work. One that comes back begins where the one that has used least is by now."""
        level_s = min((turn.used_s for turn in self._turns if turn.is_busy), default=None)
        for turn in self._turns:
            has_work = turn.core.has_work
            if level_s is None:
                turn.used_s = 0.0
            elif has_work and not turn.is_busy:
                turn.used_s = max(turn.used_s, level_s)
            if not has_work:
                turn.stream_s = 0.0
            turn.is_busy = has_work
        return [turn for turn in self._turns if turn.is_busy]

"""The steps that were launched and are not over: one, or two of which the second takes its tokens from the first.

They end in their order, each isolated from its failing requests (`isolation.py`). What the second one computed behind a
first one that raised is worth nothing: it is run again, with the tokens that the first one gave in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn, Protocol

from scheduler.types import UNKNOWN, Outcome, Span, StepPlan, StepResult
from server.engine.isolation import Failure, run_isolated


class Runner(Protocol):
    """The part of a worker that runs steps."""

    def run(self, plan: StepPlan) -> StepResult: ...
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]: ...


@dataclass(slots=True)
class _Step:
    """finish  gives the result, or raises what went wrong in either half
    known   tokens of the step before, by sequence, once that one is over
    is_sound  its tokens are where a step behind it would look for them
    """

    plan: StepPlan
    started_at: float
    finish: Callable[[], StepResult]
    known: Mapping[int, int] = field(default_factory=dict)
    is_sound: bool = True


class UnderWay:
    """clock: monotonic seconds"""

    def __init__(self, worker: Runner, clock: Callable[[], float]) -> None:
        self._worker, self._clock = worker, clock
        self._steps: list[_Step] = []

    @property
    def plan(self) -> StepPlan | None:
        """Of the step that ends next."""
        return self._steps[0].plan if self._steps else None

    @property
    def may_follow(self) -> bool:
        """There is one step, and a second one can be launched behind it."""
        return len(self._steps) == 1 and self._steps[0].is_sound

    def launch(self, plan: StepPlan) -> None:
        """Begin a step. What goes wrong comes out of `collect`."""
        step = _Step(plan, self._clock(), partial(self._worker.run, plan))
        try:
            step.finish = self._worker.launch(plan)
        except Exception as error:
            step.finish, step.is_sound = partial(_raise, error), False
        self._steps.append(step)

    def collect(self) -> tuple[StepPlan, StepResult, tuple[Failure, ...]]:
        """End the first step. Raises what isolation cannot pin on a request: then the engine must end."""
        assert self._steps, "collect() follows launch()"
        step = self._steps.pop(0)
        result, failures = run_isolated(partial(self._run, step.known), step.plan, partial(self._finish, step))
        if failures:
            result = replace(result, elapsed_s=self._clock() - step.started_at)
        for follower in self._steps:
            follower.known = {outcome.seq_id: outcome.tokens[0] for outcome in result.outcomes if outcome.tokens}
        return step.plan, result, failures

    def _finish(self, step: _Step) -> StepResult:
        try:
            return step.finish()
        except Exception:
            for follower in self._steps:
                follower.finish, follower.is_sound = partial(self._run_later, follower), False
            raise

    def _run_later(self, step: _Step) -> StepResult:
        return self._run(step.known, step.plan)

    def _run(self, known: Mapping[int, int], plan: StepPlan) -> StepResult:
        """Run a step, or parts of one, whose unknown tokens are known by now. Sequences that the step before gave none
        have ended."""
        if plan.after is None:
            return self._worker.run(plan)
        spans = [_told(span, known) for span in plan.spans]
        result = self._worker.run(replace(plan, spans=tuple(span for span in spans if span is not None), after=None))
        given = {outcome.seq_id: outcome for outcome in result.outcomes}
        lost = "the step before gave no token"
        outcomes = (given.get(span.seq_id) or Outcome(span.seq_id, error=lost) for span in plan.spans)
        return replace(result, outcomes=tuple(outcomes))


def _told(span: Span, known: Mapping[int, int]) -> Span | None:
    if span.tokens[0] != UNKNOWN:
        return span
    token = known.get(span.seq_id)
    return None if token is None else span._replace(tokens=(token,))


def _raise(error: Exception) -> NoReturn:
    raise error

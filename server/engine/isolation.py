"""A step that raises: find the sequence that did it, fail that one, give the others what they would have had.

`Worker.run` is transactional, and running a subset of a plan's spans is legal, so a failing step can be run again in
parts. Rows do not depend on their neighbours, hence the survivors' outcomes are those of the undisturbed step (R-03).
What no single sequence explains (a dead device, every part failing) is raised again: the process ends, non-zero.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scheduler.types import Fault, Outcome, Span, StepPlan, StepResult

logger = logging.getLogger(__name__)

Run = Callable[[StepPlan], StepResult]

SYSTEMIC = 4
"""This many failures in one step without one success are not a request's fault."""


class EngineFault(Exception):
    """The step cannot be made to work by leaving requests out: the engine must end."""


@dataclass(frozen=True, slots=True)
class Failure:
    seq_id: int
    fault: Fault


def is_fatal(error: BaseException) -> bool:
    """True for errors after which the device or the process cannot be trusted."""
    if not isinstance(error, Exception):
        return True
    if type(error).__name__ in ("AcceleratorError", "DeviceError", "EngineFault"):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation, host or device (torch's CPU allocator raises a plain RuntimeError)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def run_isolated(
    run: Run, plan: StepPlan, first: Callable[[], StepResult] | None = None
) -> tuple[StepResult, tuple[Failure, ...]]:
    """The plan's result and the sequences that failed; their outcomes carry an error.

    first  ends a run of the plan that has begun
    Extra forwards: none when the step works; at most log2(spans) + 1 for one culprit.
    Raises EngineFault or the worker's own error when the fault is not one request's.
    """
    try:
        return run(plan) if first is None else first(), ()
    except Exception as error:
        if is_fatal(error):
            raise
        logger.exception("step %d failed with %d spans; running it in parts", plan.step, len(plan.spans))
        return _Parts(run, plan).resolve(error)


class _Parts:
    """One failing step, run again in parts."""

    def __init__(self, run: Run, plan: StepPlan) -> None:
        self._run = run
        self._plan = plan
        self._outcomes: dict[int, Outcome] = {}
        self._failures: dict[int, Failure] = {}
        self._elapsed_s = 0.0

    def resolve(self, error: Exception) -> tuple[StepResult, tuple[Failure, ...]]:
        todo: Sequence[Span] = self._plan.spans
        current: Exception | None = error
        while todo and current is not None:
            if is_out_of_memory(current):
                self._halve(todo, current)
                break
            todo = self._find_culprit(todo, current)
            if not self._outcomes and len(self._failures) >= min(SYSTEMIC, len(self._plan.spans)) and len(todo) > 0:
                raise EngineFault(f"step {self._plan.step}: no span of it runs: {current!r}") from current
            current = self._attempt(todo) if todo else None
        if not self._outcomes and len(self._failures) >= SYSTEMIC:
            raise EngineFault(f"step {self._plan.step}: no span of it runs: {error!r}") from error
        return self._result(), tuple(self._failures.values())

    def _attempt(self, spans: Sequence[Span]) -> Exception | None:
        """Run these spans as a step; the error, or None and their outcomes are kept."""
        try:
            result = self._run(replace(self._plan, spans=tuple(spans)))
        except Exception as error:
            if is_fatal(error):
                raise
            return error
        self._elapsed_s += result.elapsed_s
        self._outcomes.update(zip((span.seq_id for span in spans), result.outcomes, strict=True))
        return None

    def _find_culprit(self, spans: Sequence[Span], error: Exception) -> Sequence[Span]:
        """Binary search in `spans`, which failed together with `error`; the spans that then are still to be run.

        Only left halves are run: a right half is known to hold the culprit when its left one works. What failed once
        only is tried alone before it is blamed, so that a passing fault fails nobody.
        """
        suspects, rest = list(spans), list[Span]()
        num_failures = 1
        while len(suspects) > 1:
            left, right = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
            failed = self._attempt(left)
            if failed is None:
                suspects = right
            else:
                error, num_failures = failed, num_failures + 1
                suspects, rest = left, right + rest
        if num_failures == 1:
            failed = self._attempt(suspects)
            if failed is None:
                return rest
            error = failed
        self._fail(suspects[0], Fault(500, f"the model could not process this request: {_reason(error)}"))
        return rest

    def _halve(self, spans: Sequence[Span], error: Exception) -> None:
        """Out of memory: run ever smaller parts; a span that does not fit alone fails with 503."""
        if len(spans) == 1:
            if self._attempt(spans) is not None:
                logger.error("step %d: sequence %d does not fit: %s", self._plan.step, spans[0].seq_id, error)
                self._fail(spans[0], Fault(503, "the server ran out of memory on this request; retry later"))
            return
        for part in _balanced(spans):
            failed = self._attempt(part)
            if failed is not None and is_out_of_memory(failed):
                self._halve(part, failed)
            elif failed is not None:
                for span in part:
                    if (alone := self._attempt([span])) is not None:
                        self._fail(span, Fault(500, f"the model could not process this request: {_reason(alone)}"))

    def _fail(self, span: Span, fault: Fault) -> None:
        self._failures[span.seq_id] = Failure(span.seq_id, fault)

    def _result(self) -> StepResult:
        outcomes = []
        for span in self._plan.spans:
            failure = self._failures.get(span.seq_id)
            outcome = self._outcomes.get(span.seq_id)
            if failure is not None:
                outcome = Outcome(span.seq_id, error=failure.fault.message)
            assert outcome is not None, "every span of a resolved step worked or failed"
            outcomes.append(outcome)
        return StepResult(self._plan.step, tuple(outcomes), self._elapsed_s)


def _balanced(spans: Sequence[Span]) -> tuple[Sequence[Span], Sequence[Span]]:
    """Two parts in span order, the cut where their tokens are closest to equal."""
    total = sum(len(span.tokens) for span in spans)
    taken, cut = 0, 1
    for index, span in enumerate(spans[:-1]):
        taken += len(span.tokens)
        cut = index + 1
        if 2 * taken >= total:
            break
    return spans[:cut], spans[cut:]


def _reason(error: Exception) -> str:
    """The kind of error only: its text may hold paths or other people's tokens (S-82); the log has all of it."""
    return type(error).__name__

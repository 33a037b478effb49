"""R-03: in a step that raises, exactly the culprit fails and its neighbours get what they would have had."""

from __future__ import annotations

import math
import random

import pytest

from scheduler.types import Outcome, Read, Span, StepPlan, StepResult
from server.engine.isolation import EngineFault, run_isolated


def make_plan(size: int) -> StepPlan:
    spans = tuple(Span(i, tuple(range(1 + i % 3)), 0, 1 + i % 3, read=Read.SAMPLE) for i in range(size))
    return StepPlan(7, spans)


class Runner:
    """Raises when a poisoned sequence is in the step, or when there are more tokens than memory."""

    def __init__(self, poisoned: set[int] = frozenset(), memory: int = 10**9, flaky: int = 0) -> None:  # type: ignore[assignment]
        self.poisoned, self.memory, self.flaky = poisoned, memory, flaky
        self.num_runs = 0

    def __call__(self, plan: StepPlan) -> StepResult:
        self.num_runs += 1
        if self.num_runs <= self.flaky or self.poisoned & {span.seq_id for span in plan.spans}:
            raise RuntimeError("secret text")
        if plan.num_tokens > self.memory:
            raise MemoryError
        return StepResult(plan.step, tuple(Outcome(span.seq_id, (span.seq_id * 10,)) for span in plan.spans), 0.001)


@pytest.mark.parametrize("seed", range(100))
def test_exactly_the_culprit_fails_within_log2_extra_forwards(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 16)
    culprit = rng.randrange(size)
    runner = Runner({culprit})
    result, failures = run_isolated(runner, make_plan(size))
    assert [failure.seq_id for failure in failures] == [culprit]
    assert failures[0].fault.status == 500
    assert "secret" not in failures[0].fault.message
    assert [outcome.seq_id for outcome in result.outcomes] == list(range(size))
    for outcome in result.outcomes:
        assert (outcome.error is not None) == (outcome.seq_id == culprit)
        assert outcome.tokens == (() if outcome.seq_id == culprit else (outcome.seq_id * 10,))
    assert runner.num_runs - 1 <= math.ceil(math.log2(size)) + 1


@pytest.mark.parametrize("seed", range(50))
def test_several_culprits_all_fail_and_nobody_else(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(4, 16)
    poisoned = set(rng.sample(range(size), rng.randint(2, 3)))
    result, failures = run_isolated(Runner(poisoned), make_plan(size))
    assert {failure.seq_id for failure in failures} == poisoned
    assert {outcome.seq_id for outcome in result.outcomes if outcome.error} == poisoned


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_a_passing_fault_fails_nobody(size: int) -> None:
    result, failures = run_isolated(Runner(flaky=1), make_plan(size))
    assert not failures
    assert all(outcome.tokens for outcome in result.outcomes)


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 8])
def test_out_of_memory_runs_in_parts_and_only_what_never_fits_gets_503(memory: int) -> None:
    plan = make_plan(12)
    result, failures = run_isolated(Runner(memory=memory), plan)
    too_large = {span.seq_id for span in plan.spans if len(span.tokens) > memory}
    assert {failure.seq_id for failure in failures} == too_large
    assert all(failure.fault.status == 503 for failure in failures)
    assert [outcome.seq_id for outcome in result.outcomes] == list(range(12))


def test_a_step_of_which_nothing_runs_is_the_engines_fault() -> None:
    with pytest.raises(EngineFault):
        run_isolated(Runner(set(range(8))), make_plan(8))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access"), SystemExit(1), KeyboardInterrupt()])
def test_a_dead_device_is_not_searched_for_culprits(error: BaseException) -> None:
    runs = []

    def run(plan: StepPlan) -> StepResult:
        runs.append(plan)
        raise error

    with pytest.raises(type(error)):
        run_isolated(run, make_plan(8))
    assert len(runs) == 1

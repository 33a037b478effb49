"""What `update` and `fail` make of outcomes, good and bad."""

from __future__ import annotations

import pytest

from scheduler.scheduler import Scheduler
from scheduler.types import Fault, FinishReason, Outcome, StepResult
from tests.scheduler.worlds import World, make_limits, make_request


def test_a_failed_outcome_ends_only_its_own_request() -> None:
    world = World(make_limits())
    for number in range(3):
        world.add(make_request(f"r{number}", (number,) * 6, max_tokens=6))
    world.step()
    world.step(spoil="r1")
    last = world.stories["r1"].deltas[-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.fault == Fault(500, "spoiled")
    world.finish()


def test_an_outcome_that_does_not_answer_its_span_fails_its_request() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_request("a", 3), 0.0)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    deltas, _ = scheduler.update(plan, StepResult(plan.step, (Outcome(plan.spans[0].seq_id),), 0.01), 0.0)
    assert deltas[0].fault == Fault(500, "the worker returned 0 tokens where 1 was due")
    scheduler.check_invariants()


def test_the_result_of_another_step_is_refused_and_changes_nothing() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_request("a", 3), 0.0)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    with pytest.raises(ValueError, match="step 1 is due"):
        scheduler.update(plan, StepResult(2, (), 0.01), 0.0)
    with pytest.raises(ValueError, match="one per span"):
        scheduler.update(plan, StepResult(1, (), 0.01), 0.0)
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.schedule(0.0)
    outcome = Outcome(plan.spans[0].seq_id, (4,))
    deltas, _ = scheduler.update(plan, StepResult(1, (outcome,), 0.01), 0.0)
    assert deltas[0].tokens == (4,)


def test_fail_ends_a_request_with_its_fault_and_unknown_ones_are_ignored() -> None:
    world = World(make_limits())
    world.add(make_request("a", 8))
    world.step()
    delta = world.scheduler.fail("a", Fault(503, "shutting down"))
    assert delta is not None
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.fault == Fault(503, "shutting down")
    assert world.scheduler.fail("a", Fault(503, "shutting down")) is None
    assert world.scheduler.stats().pages_used == 0


def test_times_add_up_to_the_life_of_the_request() -> None:
    world = World(make_limits())
    world.now = 5.0
    world.add(make_request("a", 8, max_tokens=4))
    world.now = 7.0
    world.finish()
    times = world.stories["a"].deltas[-1].times
    assert times is not None
    assert times.queue_s == pytest.approx(2.0)
    assert times.queue_s + times.prefill_s + times.decode_s == pytest.approx(world.now - 5.0)

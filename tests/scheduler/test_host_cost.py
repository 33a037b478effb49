"""The host's share of a step: what drafts save, and what they cost beside the worker."""

from __future__ import annotations

import random

import pytest

from scheduler.drafting import DraftingPolicy
from scheduler.fake_worker import FakeWorker
from scheduler.host_cost import HostCost
from scheduler.scheduler import Scheduler
from scheduler.types import Speculation, SpeculationMode, SpeculationSettings, StepResult
from tests.scheduler.draft_worlds import flat_cost
from tests.scheduler.test_drafting import always_right, num_drafts, world
from tests.scheduler.worlds import make_limits, make_request


def test_plain_and_drafting_steps_are_told_apart() -> None:
    cost, rng = HostCost(), random.Random(0)
    for step in range(400):
        num_asked = step % 3 * rng.randrange(1, 9)
        extra_s = 1e-4 + 5e-5 * num_asked if num_asked else 0.0
        cost.observe((3e-4 + extra_s) * rng.uniform(0.95, 1.05), num_asked)
    assert cost.plain_s == pytest.approx(3e-4, rel=0.1)
    assert cost.asking[0] == pytest.approx(1e-4, rel=0.4)
    assert cost.asking[1] == pytest.approx(5e-5, rel=0.2)
    assert cost.verifying_s(8) == 0.0


def test_what_asking_costs_is_told_from_what_verifying_costs() -> None:
    """Nearly every step of a text that drafts well does both; the few that only ask, or only verify, tell."""
    cost, rng = HostCost(), random.Random(0)
    for step in range(600):
        num_asked, num_verified = (1, 4 + step % 5) if step % 10 else ((1, 0), (0, 3), (0, 0))[step // 10 % 3]
        seconds = 1e-4 + 5e-5 * num_asked + (1e-4 + 5e-6 * num_verified if num_verified else 0.0)
        cost.observe(seconds * rng.uniform(0.95, 1.05), num_asked, num_verified)
    assert sum(cost.asking) == pytest.approx(5e-5, rel=0.3)
    assert cost.verifying_s(6) == pytest.approx(1.3e-4, rel=0.15)
    assert cost.verifying_s(0) == 0.0


@pytest.mark.parametrize("worked", [(0, 0), (3, 0), (3, 9), (0, 9)])
def test_a_first_sample_far_off_is_forgotten_whatever_steps_follow(worked: tuple[int, int]) -> None:
    """Or else drafting could never stop, or never begin."""
    cost = HostCost()
    cost.observe(12e-3)
    for _ in range(100):
        cost.observe(3e-4, *worked)
    assert cost.plain_s == pytest.approx(3e-4, rel=0.1)
    assert sum(cost.asking) + cost.verifying_s(9) < 1e-5


def test_a_wait_now_and_then_hardly_counts() -> None:
    cost = HostCost()
    for step in range(300):
        cost.observe(1.0 if step % 50 == 20 else 3e-4)
    assert cost.plain_s < 4.5e-4
    cost.observe(-1.0)
    assert cost.plain_s < 4.5e-4


def test_the_time_between_two_plans_is_the_hosts_but_for_the_workers() -> None:
    limits = make_limits()
    scheduler = Scheduler(limits, flat_cost(), bytes(32), SpeculationSettings())
    policy, worker = scheduler.policy, FakeWorker(limits.num_pages, limits.page_size)
    assert isinstance(policy, DraftingPolicy)

    def step(planned_at: float, updated_at: float) -> None:
        plan = scheduler.schedule(planned_at)
        assert plan is not None
        scheduler.update(plan, StepResult(plan.step, worker.run(plan), 1.0), updated_at)

    scheduler.add(make_request("a", 5, max_tokens=2), 0.0)
    step(0.0, 1.25)
    step(1.5, 2.5)
    assert policy.host_s == 0.5
    # It had nothing to do until 9.0.
    scheduler.add(make_request("b", 5, max_tokens=2), 9.0)
    step(9.0, 10.0)
    assert policy.host_s == 0.5


def test_what_prompts_cost_is_no_part_of_a_plain_step() -> None:
    """Where texts are short every third step has one, and no draft saves that."""
    cost, rng = HostCost(), random.Random(0)
    for step in range(400):
        has_prompts = step % 3 == 0
        num_asked = int(step % 6 in (2, 3))
        seconds = 1e-4 + 1.5e-4 * has_prompts + 5e-5 * num_asked
        cost.observe(seconds * rng.uniform(0.95, 1.05), num_asked, 0, has_prompts)
    assert cost.plain_s == pytest.approx(1e-4, rel=0.1)
    assert sum(cost.asking) == pytest.approx(5e-5, rel=0.2)


def test_what_a_plain_step_takes_is_not_guessed_for_ever_from_steps_that_are_none() -> None:
    """The first step has a prompt, and then all draft: from those alone nothing can be told of plain ones."""
    cost = HostCost()
    cost.observe(3e-4, 1, 0, has_prompts=True)
    for _ in range(15):
        assert cost.plain_s > 2e-4
        cost.observe(4e-4, 1, 4)
    assert cost.is_stale
    cost.observe(1e-4)
    assert not cost.is_stale
    assert cost.plain_s == pytest.approx(1e-4)


@pytest.mark.parametrize("mode", [SpeculationMode.AUTO, SpeculationMode.ON])
def test_a_stream_that_always_drafts_does_without_now_and_then(mode: SpeculationMode) -> None:
    """But for one that insists on its drafts."""
    running = world(
        make_limits(max_model_len=2000, num_pages=1000), lambda known, most, truth: always_right(known, 2, truth)
    )
    running.add(make_request("a", 5, max_tokens=1500, speculation=Speculation(mode)))
    while running.step() is not None:
        running.now += 1e-3
    plain = [plan for plan in running.plans[2:-1] if not any(num_drafts(plan)) and not plan.spans[0].num_drafts]
    assert len(plain) in (range(5, 9) if mode is SpeculationMode.AUTO else (0,))


def test_what_costs_nothing_more_is_learned_too() -> None:
    """An early sample that was far off would stay for ever if those that say nothing was added were left out."""
    cost = HostCost()
    for _ in range(8):
        cost.observe(1e-3)
    cost.observe(3e-3, num_asked=1)
    assert sum(cost.asking) > 1e-3
    for _ in range(60):
        cost.observe(1e-3, num_asked=1)
    assert sum(cost.asking) < 2e-4


def test_where_every_step_has_prompts_nobody_waits_for_a_plain_one() -> None:
    """There is none to be measured: drafts would rest for as long as the load lasts."""
    limits = make_limits(max_model_len=2000, num_pages=2000, max_batched_tokens=64, max_seqs=8)
    running = world(limits, lambda known, most, truth: always_right(known, 2, truth))
    running.add(make_request("stream", 5, max_tokens=900))
    for number in range(200):
        running.add(make_request(f"prompt {number}", (number % 7,) * 40, max_tokens=1))
        assert running.step() is not None
        running.now += 1e-3
    with_prompts = sum(len(plan.spans) > 1 for plan in running.plans[50:])
    drafted = sum(max(num_drafts(plan)) > 0 for plan in running.plans[50:])
    assert with_prompts > 140
    assert drafted > 140

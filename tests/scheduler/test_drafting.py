"""The step policy with drafts, in whole steps: the failures that engines have had, each as an example."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from scheduler import simulated_drafts
from scheduler.acceptance import RequestCounts
from scheduler.draft_state import make_state
from scheduler.drafting import DraftingPolicy
from scheduler.fake_worker import FakeDrafter, Known, Truth
from scheduler.scheduler import Scheduler
from scheduler.simulated_drafts import STREAM_ALPHAS, ScriptedDrafter, stream
from scheduler.simulation import Arrival, Machine, request_of, simulate
from scheduler.step_cost import StepCost
from scheduler.types import (
    LEARN_MOST,
    Drafts,
    Limits,
    Read,
    Speculation,
    SpeculationMode,
    SpeculationSettings,
    SpeculationUsage,
    StepFeatures,
    StepPlan,
    StepSample,
)
from tests.scheduler.draft_worlds import flat_cost
from tests.scheduler.worlds import VOCAB, World, make_limits, make_request

WRONG, RIGHT, MIXED = STREAM_ALPHAS["wrong"], STREAM_ALPHAS["right"], STREAM_ALPHAS["mixed"]


def always_right(known: Known, most: int, truth: Truth) -> Drafts:
    return Drafts(truth(most), tuple(0.9 ** (j + 1) for j in range(most)), "right")


def world(
    limits: Limits | None = None,
    drafter: FakeDrafter = always_right,
    settings: SpeculationSettings | None = None,
    cost: StepCost | None = None,
) -> World:
    limits = limits or make_limits()
    settings = settings or SpeculationSettings()
    return World(limits, Scheduler(limits, cost or flat_cost(), bytes(32), settings), drafter=drafter)


def num_drafts(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [len(span.tokens) - 1 if span.read is Read.VERIFY else 0 for span in plan.spans]


def test_right_drafts_become_many_tokens_a_step() -> None:
    running = world()
    running.add(make_request("a", 5, max_tokens=60))
    running.finish()
    # Without drafts it takes 60 steps.
    assert len(running.plans) < 25
    usages = [delta.speculation for delta in running.stories["a"].deltas if delta.speculation is not None]
    total = sum(usages, SpeculationUsage())
    assert total.accepted == 60 - len(running.stories["a"].deltas)
    assert total.steps == sum(stats.drafted_seqs for stats in running.stats)


def test_who_switched_speculation_off_costs_no_draft_work_at_all() -> None:
    running = world(settings=SpeculationSettings(has_sequential=True))
    for number in range(3):
        running.add(make_request(f"r{number}", 5, max_tokens=30, speculation=Speculation(SpeculationMode.OFF)))
    running.finish()
    assert all(span.num_drafts == 0 for plan in running.plans for span in plan.spans)
    assert all(plan.draft_depth == 0 for plan in running.plans)


def test_without_settings_nobody_is_asked() -> None:
    limits = make_limits()
    running = World(limits, Scheduler(limits, flat_cost(), bytes(32)), drafter=always_right)
    running.add(make_request("a", 5, max_tokens=30, speculation=Speculation(SpeculationMode.ON)))
    running.finish()
    assert all(span.num_drafts == 0 for plan in running.plans for span in plan.spans)


def test_on_verifies_what_is_offered_up_to_its_own_limit() -> None:
    asked = Speculation(SpeculationMode.ON, max_tokens=3)
    hopeless = ScriptedDrafter(alpha=(1.0, 500.0))
    running = world(drafter=hopeless)
    running.add(make_request("a", 5, max_tokens=40, speculation=asked))
    running.finish()
    verified = [count for plan in running.plans[1:-8] for count in num_drafts(plan)]
    assert set(verified) == {3}


def test_on_makes_a_model_drafter_run_and_nobody_asking_lets_it_rest() -> None:
    running = world(settings=SpeculationSettings(has_sequential=True), drafter=ScriptedDrafter(alpha=(1.0, 500.0)))
    running.add(make_request("a", 5, max_tokens=40, speculation=Speculation(SpeculationMode.ON, max_tokens=3)))
    running.finish()
    for plan in running.plans:
        is_asked = any(span.num_drafts for span in plan.spans)
        assert is_asked or plan.draft_depth == 0
        if is_asked and plan.step > 1:
            assert plan.draft_depth >= 3


def test_drafts_count_in_the_budget_and_never_push_out_a_decode() -> None:
    running = world(make_limits(max_batched_tokens=10, max_seqs=8))
    for number in range(8):
        running.add(make_request(f"r{number}", (number,), max_tokens=30, speculation=Speculation(SpeculationMode.ON)))
    running.finish()
    assert all(plan.num_tokens <= 10 for plan in running.plans)
    assert max(sum(num_drafts(plan)) for plan in running.plans) >= 2


def test_who_insists_on_drafts_does_not_starve_prompts() -> None:
    limits = make_limits(max_batched_tokens=24, max_seqs=4, max_model_len=400, num_pages=600)
    running = world(limits)
    for number in range(3):
        request = make_request(f"r{number}", (number,), 300, speculation=Speculation(SpeculationMode.ON))
        running.add(request)
    for _ in range(4):
        running.step()
    running.add(make_request("prompt", (5,) * 100, max_tokens=1))
    for _ in range(9):
        running.step()
    assert not running.stories["prompt"].is_alive
    assert max(sum(num_drafts(plan)) for plan in running.plans[4:]) >= 5
    running.finish()


def test_nobody_is_preempted_for_drafts() -> None:
    """As many pages as the texts need, not one more."""
    limits = make_limits(max_seqs=4, max_model_len=40, num_pages=40, page_size=4, watermark_pages=0)
    plain = World(limits, Scheduler(limits, flat_cost(), bytes(32)))
    drafting = world(limits, settings=SpeculationSettings("fixed", 20))
    for running in (plain, drafting):
        for number in range(4):
            running.add(make_request(f"r{number}", (number,) * 8, max_tokens=32))
        running.finish()
        assert sum(stats.num_preempted for stats in running.stats) == 0
    assert sum(stats.accepted_tokens for stats in drafting.stats) > 20


def test_an_offer_that_makes_no_sense_is_dropped_and_its_request_goes_on() -> None:
    running = world(drafter=lambda known, most, truth: Drafts(truth(most + 1), (0.5,) * (most + 1), "rude"))
    running.add(make_request("a", 5, max_tokens=10))
    running.finish()
    assert sum(stats.draft_tokens for stats in running.stats) == 0


def test_trees_are_cut_to_their_first_branch_while_many_decode() -> None:
    def tree(known: Known, most: int, truth: Truth) -> Drafts | None:
        if most < 3:
            return None
        first, second = truth(2)
        return Drafts((first, second, 1), (0.9, 0.8, 0.7), "tree", (-1, 0, -1))

    for num_seqs, branches in ((1, True), (3, False)):
        running = world(drafter=tree, settings=SpeculationSettings(tree_max_seqs=2))
        for number in range(num_seqs):
            running.add(make_request(f"r{number}", (number,), max_tokens=12))
        for _ in range(4):
            plan = running.step()
        assert plan is not None
        assert any(span.parents for span in plan.spans) is branches
        assert max(num_drafts(plan)) == (3 if branches else 2)
        running.finish()


def test_a_request_at_no_drafts_comes_back_when_its_text_becomes_predictable() -> None:
    """Without probes the estimate of a request that is not asked could never recover."""

    def turning(known: Known, most: int, truth: Truth) -> Drafts:
        is_right = len(known.tokens) > 200
        tokens = tuple(token if is_right else (token + 1) % 23 for token in truth(most))
        return Drafts(tokens, tuple(0.7 ** (j + 1) for j in range(most)), "turning")

    limits = make_limits(max_model_len=600, num_pages=400)
    # A row costs a tenth of a step: what is hardly ever right does not pay.
    cost = StepCost([StepSample(StepFeatures(n, 0, 1), 0.01 + 0.001 * n) for n in (1, 8, 16, 32)])
    running = world(limits, turning, cost=cost)
    running.elapsed_of = lambda rows: 0.01 + 0.001 * rows
    running.add(make_request("a", 5, max_tokens=500))
    running.finish()
    drafted = [stats.draft_tokens for stats in running.stats]
    assert sum(drafted[90:190]) <= 8
    assert len(running.plans) < 195 + 150


def test_verified_drafts_must_save_what_they_cost_the_host() -> None:
    """A draft saves 11 ms, and the host takes 16 longer in a step that verifies any: two pay, one does not."""

    def one_or_two(known: Known, most: int, truth: Truth) -> Drafts:
        return always_right(known, 1 + len(known.tokens) // 3 % 2, truth)

    running = world(make_limits(max_model_len=900, num_pages=600), one_or_two)
    running.add(make_request("a", 5, max_tokens=800))
    while (plan := running.step()) is not None:
        running.now += 1e-3 + (16e-3 if any(num_drafts(plan)) else 0.0)
    verified = [sum(num_drafts(plan)) for plan in running.plans[len(running.plans) // 2 :]]
    assert verified.count(2) > 0.2 * len(verified)
    assert verified.count(1) < 0.05 * len(verified)


@pytest.mark.parametrize("count", [1, 8, 32])
def test_drafts_that_are_always_wrong_cost_next_to_nothing(count: int) -> None:
    plain, drafted = stream(WRONG, count, None), stream(WRONG, count, SpeculationSettings())
    assert drafted.output_tokens >= 0.97 * plain.output_tokens


@pytest.mark.parametrize("alpha", [RIGHT, MIXED])
@pytest.mark.parametrize("count", [1, 8, 32])
def test_no_fixed_number_of_drafts_is_much_better(alpha: tuple[float, float], count: int) -> None:
    best = max(stream(alpha, count, SpeculationSettings("fixed", k)).output_tokens for k in (1, 3, 8))
    assert stream(alpha, count, SpeculationSettings()).output_tokens >= 0.95 * best


def test_mixed_traffic_is_told_apart() -> None:
    """One rate for all would give the hopeless half what the other half earns."""
    mixed = stream(MIXED, 16, SpeculationSettings())
    uniform = stream(MIXED, 16, SpeculationSettings("uniform"))
    assert mixed.output_tokens > 1.02 * uniform.output_tokens
    assert mixed.accepted_tokens / mixed.draft_tokens > uniform.accepted_tokens / uniform.draft_tokens


@pytest.mark.parametrize("alpha", [WRONG, MIXED, RIGHT])
def test_step_times_are_predicted_within_a_tenth_while_speculating(alpha: tuple[float, float]) -> None:
    assert stream(alpha, 8, SpeculationSettings()).step_error < 0.1


def test_the_time_of_proposing_is_no_part_of_the_targets_step_time() -> None:
    dear = Machine(draft_s=5e-3, noise=0.01, outlier_rate=0.0)
    rng = random.Random(0)
    arrivals = [Arrival(0.0, request_of(f"s{n}", 64, 400, rng)) for n in range(4)]
    limits = Limits(2048, 64, 4096, 16384, 16)
    report = simulate(limits, arrivals, dear, 0, 5.0, SpeculationSettings("fixed", 2), ScriptedDrafter(RIGHT))
    assert report.step_error < 0.05


@pytest.fixture(scope="module")
def latencies() -> dict[str, float]:
    """Mean latency in seconds at 24 requests/s of the published 8B-class model."""
    return {
        name: fmean(simulated_drafts.run(name, 24.0, 150).latency_s)
        for name in ("k=0", "fixed 3", "myopic (w=0)", "marginal")
    }


def test_under_load_the_planner_is_at_least_as_good_as_the_best_fixed_number(latencies: dict[str, float]) -> None:
    assert latencies["marginal"] <= min(latencies["k=0"], latencies["fixed 3"])


def test_without_a_price_of_prompts_drafts_starve_them(latencies: dict[str, float]) -> None:
    assert latencies["myopic (w=0)"] > 1.08 * latencies["marginal"]


def test_drafts_behind_the_end_of_a_text_count_as_wrong() -> None:
    """They are verified and thrown away: where texts are short, an offer is worth less than its drafts are right."""
    expected = []
    for stop_ids in ((), tuple(range(0, VOCAB, 4))):
        running = world(make_limits(max_model_len=600, num_pages=400))
        for number in range(30):
            running.add(make_request(f"r{number}", (number % 20, 1, 2, number // 20), max_tokens=40, stop_ids=stop_ids))
            running.finish()
        policy = running.scheduler.policy
        assert isinstance(policy, DraftingPolicy)
        offer = Drafts((1,) * 8, tuple(0.9 ** (j + 1) for j in range(8)), "right")
        assert (policy._price.lasts < 0.9) is bool(stop_ids)
        expected.append(sum(policy.acceptance.survivals(offer, RequestCounts())))
    assert expected[0] > 7
    assert expected[1] < 0.6 * expected[0]


@pytest.mark.parametrize(("count", "is_asked"), [(1, True), (16, False)])
def test_prompts_that_come_together_expect_what_a_crowd_gets(count: int, is_asked: bool) -> None:
    running = world(make_limits(max_seqs=32, max_batched_tokens=256, max_model_len=64, num_pages=400))
    policy = running.scheduler.policy
    assert isinstance(policy, DraftingPolicy)
    for load, gain_s in ((1, 1.0), (16, 0.0)):
        state = make_state(Speculation(), 8)
        policy._first_gains.expect(state, load)
        policy._first_gains.observe(state, gain_s, is_of_masks=False)
    policy._asking.cost.observe(1, 0, 1e-3)
    for number in range(count):
        running.add(make_request(f"r{number}", (number, 1, 2, 3), max_tokens=8))
    plan = running.step()
    assert plan is not None
    assert [span.num_drafts > 0 for span in plan.spans] == [is_asked] * count


def test_a_fixed_number_rests_in_no_step() -> None:
    """Only who chooses has to know what a plain step takes: a fixed number is what others are compared with."""
    running = world(
        make_limits(max_model_len=200, num_pages=400), settings=SpeculationSettings(policy="fixed", max_drafts=1)
    )
    running.add(make_request("r", 3, max_tokens=100))
    while running.step() is not None:
        running.now += 1e-3
    assert [num_drafts(plan) for plan in running.plans[1:-1]] == [[1]] * (len(running.plans) - 2)


def test_a_long_prompt_is_taken_in_over_several_steps_and_anew_after_a_preemption() -> None:
    limits = make_limits(max_model_len=4000, num_pages=4000, max_batched_tokens=4000, max_seqs=2)
    running = world(limits, settings=SpeculationSettings("fixed", 2))
    running.add(make_request("r", (3,) * (2 * LEARN_MOST + 10), max_tokens=100))
    running.step()
    [seq] = running.scheduler._queues.running
    state = seq.drafting
    assert state is not None
    seen = [state.num_seen]
    for _ in range(3):
        running.step()
        seen.append(state.num_seen)
    assert seen[:2] == [LEARN_MOST, 2 * LEARN_MOST]
    assert 2 * LEARN_MOST < seen[2] < seen[3] <= len(seq.tokens)
    seq.decoding.restart()
    assert state.num_seen == 0

"""A scheduler beside other models: less time for prompts and drafts, never less for decodes."""

from __future__ import annotations

import random

import pytest

from scheduler.draft_plan import ALONE, Others
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from scheduler.types import Limits, SpeculationSettings, StepPlan
from tests.scheduler.test_budget import seeded_cost, sizes
from tests.scheduler.test_drafting import always_right
from tests.scheduler.worlds import World, make_limits, make_request


class Beside(Scheduler):
    """Is always told of the same others."""

    def __init__(
        self, limits: Limits, cost: StepCost, others: Others, speculation: SpeculationSettings | None = None
    ) -> None:
        super().__init__(limits, cost, bytes(32), speculation)
        self.others = others

    def schedule(self, now: float, others: Others = ALONE) -> StepPlan | None:
        return super().schedule(now, self.others)


def mixed_step(others: Others, tbt_slo_s: float | None, has_decode: bool = True) -> list[int]:
    """Sizes of the spans of a step in which a long prompt waits, beside a decode or alone."""
    limits = make_limits(max_batched_tokens=900, max_model_len=2000, num_pages=2000, tbt_slo_s=tbt_slo_s)
    world = World(limits, Beside(limits, seeded_cost(), others))
    if has_decode:
        world.add(make_request("first", 4, max_tokens=99))
        world.step()
    world.add(make_request("second", (2,) * 1500))
    return sizes(world.step())


@pytest.mark.parametrize(
    ("others", "rows"),
    [
        (ALONE, 649),  # 90 ms / 1.2 - 10.1 ms, at 0.1 ms a row
        (Others(1, 0.0), 274),  # half of the target
        (Others(1, 0.03), 274),
        (Others(1, 0.06), 49),  # what the others' streams leave
        (Others(2, 0.02), 149),  # a third
        (Others(1, 0.09), 16),  # nothing is left: prompts go on in the least chunks
        (Others(1, 9.0), 16),
    ],
)
def test_an_explicit_target_is_of_a_round_and_shared_out(others: Others, rows: int) -> None:
    decode, prompt = mixed_step(others, 0.09)
    assert decode == 1
    assert prompt == pytest.approx(rows, abs=8)


def test_without_a_target_the_round_is_measured_by_the_streams_of_all() -> None:
    alone, same, slow = (mixed_step(others, None)[1] for others in (ALONE, Others(1, 0.0101), Others(1, 0.05)))
    # Twice the streams, half of it each.
    assert same == pytest.approx(alone, abs=8)
    # 2.1 x 60 ms / 1.2 / 2 buy more than 2.1 x 10 ms / 1.2: a stream beside slow ones is used to longer gaps.
    assert slow > 2 * alone
    assert slow <= (2.1 * 0.0601 / 1.2 / 2 - 0.01) / 1e-4


def test_prompts_without_decodes_are_bounded_only_beside_streams() -> None:
    assert mixed_step(ALONE, 0.04, has_decode=False) == [900]
    assert mixed_step(Others(1, 0.0), 0.04, has_decode=False) == [900]
    (rows,) = mixed_step(Others(1, 0.01), 0.04, has_decode=False)
    assert rows == pytest.approx((0.04 / 1.2 / 2 - 0.01) / 1e-4, abs=4)


@pytest.mark.parametrize(
    ("others", "tbt_slo_s", "are_verified"),
    [
        (ALONE, 0.0225, True),
        (Others(1, 0.01), 0.0225, False),  # 10.2 ms are left, and the decode takes 10.1
        (Others(1, 0.01), 0.05, True),
        (Others(1, 0.0001), None, True),
    ],
)
def test_drafts_are_bought_from_what_the_round_leaves(
    others: Others, tbt_slo_s: float | None, are_verified: bool
) -> None:
    limits = make_limits(tbt_slo_s=tbt_slo_s)
    scheduler = Beside(limits, seeded_cost(), others, SpeculationSettings())
    world = World(limits, scheduler, drafter=always_right)
    world.add(make_request("a", 5, max_tokens=60))
    world.finish()
    assert (sum(stats.draft_tokens for stats in world.stats) > 30) == are_verified


def test_what_the_streams_need_is_told_without_prompts() -> None:
    limits = make_limits(max_batched_tokens=400, max_model_len=2000, num_pages=2000)
    world = World(limits, Scheduler(limits, seeded_cost()))
    assert world.scheduler.policy.stream_s == 0.0
    world.add(make_request("first", 4, max_tokens=99))
    world.step()
    assert world.scheduler.policy.stream_s == 0.0
    world.add(make_request("second", (2,) * 900))
    assert len(sizes(world.step())) == 2
    assert world.scheduler.policy.stream_s == pytest.approx(0.0101, rel=0.05)


@pytest.mark.parametrize("seed", range(40))
def test_no_decode_is_ever_left_out_however_long_the_others_take(seed: int) -> None:
    """`World.step` fails where one is."""
    rng = random.Random(seed)
    limits = make_limits(max_batched_tokens=64, max_model_len=400, num_pages=120, tbt_slo_s=rng.choice([None, 0.02]))
    scheduler = Beside(limits, seeded_cost(), ALONE)
    world = World(limits, scheduler)
    for i in range(30):
        scheduler.others = Others(rng.randint(0, 3), rng.choice([0.0, 0.01, 10.0]))
        if rng.random() < 0.5:
            world.add(make_request(f"r{i}", tuple(rng.randrange(9) for _ in range(rng.randint(1, 90))), max_tokens=12))
        world.step()
    scheduler.others = Others(2, 10.0)
    world.run()

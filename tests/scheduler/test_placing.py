"""Mask rows behind a decode: to the end of their block, inside the pages, the model's length and the step's rows."""

from __future__ import annotations

import pytest

from scheduler.step_cost import StepCost
from scheduler.types import Limits, Speculation, SpeculationSettings, StepFeatures, StepPlan, StepSample
from tests.scheduler.test_drafting import world
from tests.scheduler.worlds import make_limits, make_request

BLOCK = 8
SETTINGS = SpeculationSettings("fixed", 8, mask_drafter="masks", mask_block=BLOCK)


def plans_of(prompt: int, limits: Limits | None = None, drafter: str = "auto", count: int = 1) -> list[StepPlan]:
    running = world(limits, settings=SETTINGS)
    for number in range(count):
        running.add(make_request(f"r{number}", prompt, max_tokens=24, speculation=Speculation(drafter=drafter)))
    running.finish()
    return list(running.plans)


@pytest.mark.parametrize("prompt", [5, 7, 8, 15])
def test_masks_reach_from_the_last_draft_to_the_end_of_their_block(prompt: int) -> None:
    spans = [span for plan in plans_of(prompt) for span in plan.spans if span.num_drafts]
    assert any(span.num_masks for span in spans)
    for span in spans:
        start = span.start + len(span.tokens)
        count = min((start // BLOCK + 1) * BLOCK - start, span.num_drafts)
        assert span.num_masks == (count if count > 1 else 0)


def test_masks_count_in_the_budget_and_stay_inside_pages_and_length() -> None:
    limits = make_limits(max_batched_tokens=24, max_seqs=4, max_model_len=30, num_pages=32)
    plans = plans_of(5, limits, count=4)
    assert any(span.num_masks for plan in plans for span in plan.spans)
    for plan in plans:
        assert sum(len(span.tokens) + span.num_masks for span in plan.spans) <= 24
        for span in plan.spans:
            assert span.start + len(span.tokens) + span.num_masks <= 30


def test_a_request_for_another_drafter_has_none() -> None:
    assert not any(span.num_masks for plan in plans_of(5, drafter="suffix") for span in plan.spans)
    assert any(span.num_masks for plan in plans_of(5, drafter="masks") for span in plan.spans)


def test_a_step_without_masks_is_not_credited_with_masks() -> None:
    """What lookups saved in it must not count as what masks saved."""
    running = world(settings=SETTINGS)
    running.add(make_request("r", 5, max_tokens=24))
    running.step()
    (seq,) = running.scheduler._queues.running
    state = seq.drafting
    assert state is not None
    assert state.is_masked
    state.may_mask = False
    for _ in range(2):
        running.step()
    assert not state.is_masked


class FreeRows(StepCost):
    """A step takes 10 ms, however many rows it has."""

    def predict(self, features: StepFeatures) -> float:
        return 0.01


def test_where_a_row_costs_nothing_a_step_past_its_bound_is_no_error() -> None:
    settings = SpeculationSettings(mask_drafter="masks", mask_block=BLOCK)
    cost = FreeRows([StepSample(StepFeatures(1, 0, 1), 0.01)])
    running = world(make_limits(tbt_slo_s=1e-6), settings=settings, cost=cost)
    running.elapsed_of = lambda rows: 0.01
    running.add(make_request("r", 5, max_tokens=24))
    running.finish()
    assert any(span.num_drafts for plan in running.plans for span in plan.spans)


def test_a_prompt_that_nobody_waits_for_has_masks_though_decodes_left_no_room_for_any() -> None:
    cost = StepCost([StepSample(StepFeatures(n, 0, 1, 9), 0.01 + 0.005 * n) for n in (1, 4, 8, 16)])
    running = world(make_limits(tbt_slo_s=0.016), settings=SETTINGS, cost=cost)
    running.elapsed_of = lambda rows: 0.01 + 0.005 * rows
    for name in ("a", "b"):
        running.add(make_request(name, 5, max_tokens=24))
        first = running.step()
        assert first is not None
        assert first.spans[0].num_masks == 3
        running.finish()
    decodes = [span for plan in running.plans for span in plan.spans if span.start >= 5]
    assert not any(span.num_masks for span in decodes)

"""Planners' windows, quotas and the threshold of `auto`: integers, known in advance."""

from __future__ import annotations

import pytest

from scheduler.decoding.auto_threshold import AutoThreshold, under_load
from scheduler.decoding.windows import plan_window, quota
from scheduler.policies import make_diffusion
from scheduler.types import Choice, Denoise, Read, Span, Topology

M = 99


def window(planner: Choice, text: str, origin: int = 0) -> tuple[int, int]:
    """The window of a block written as text, a dot for each mask."""
    return plan_window(planner, [M if c == "." else 1 for c in text], M, 0, len(text), origin)


def test_a_fixed_window_is_the_whole_block() -> None:
    assert window(Choice("fixed"), "x..x") == (0, 4)


@pytest.mark.parametrize(
    ("text", "expected"), [("........", (0, 3)), ("xx......", (0, 3)), ("xxx.....", (3, 6)), ("xxxxxx.x", (6, 8))]
)
def test_sub_blocks_are_filled_from_left_to_right(text: str, expected: tuple[int, int]) -> None:
    assert window(Choice("sub_blocks", (("sub_block", 3),)), text) == expected


@pytest.mark.parametrize(
    ("most", "text", "origin", "expected"),
    [
        (0, "........", 0, (0, 2)),
        (0, "x.......", 0, (1, 3)),
        (0, ".x......", 0, (0, 3)),
        (0, "p.......", 1, (1, 3)),
        (0, "xxxxxxx.", 0, (7, 8)),
        (2, ".xx.....", 0, (0, 2)),
        (3, ".xx.....", 0, (0, 3)),
    ],
)
def test_a_sliding_window_grows_by_what_is_fixed_up_to_its_widest(
    most: int, text: str, origin: int, expected: tuple[int, int]
) -> None:
    assert window(Choice("dsb", (("first", 2), ("most", most))), text, origin) == expected


def test_a_window_of_masks_ends_with_the_last_of_them() -> None:
    planner = Choice("masks", (("width", 2),))
    assert window(planner, "x.x.x..x") == (1, 4)
    assert window(planner, "xxxxxx.x") == (6, 7)


def test_quotas_spread_all_masks_over_the_steps() -> None:
    assert [quota(10, 4, step) for step in range(4)] == [3, 3, 2, 2]
    assert [quota(3, 3, step) for step in range(4)] == [1, 1, 1, 1]
    for masks in range(1, 20):
        for steps in range(1, masks + 1):
            assert sum(quota(masks, steps, step) for step in range(steps)) == masks


def auto(**values: float) -> AutoThreshold:
    return AutoThreshold(make_diffusion("auto", Topology.BLOCK_CAUSAL, values=values).selector)


def test_agreement_lowers_the_threshold_down_to_its_lowest() -> None:
    controller = auto(threshold=0.9, lowest=0.85)
    controller.learn({}, [(4, 7, 0.8), (5, 8, 0.8)])
    assert controller.value == 0.9
    controller.learn({4: 7}, [(5, 8, 0.8)])
    assert controller.value == pytest.approx(0.88)
    for _ in range(9):
        controller.learn({}, [(5, 8, 0.8)])
    assert controller.value == 0.85


def test_one_miss_outweighs_many_agreements_and_the_threshold_never_leaves_its_bounds() -> None:
    controller = auto(threshold=0.9, lowest=0.5)
    guesses = [(p, 7, 0.85) for p in range(20)]
    controller.learn({}, guesses)
    controller.learn({}, guesses)
    low = controller.value
    assert low == pytest.approx(0.7)
    controller.learn({}, [(p, 7 + (p == 3), 0.85) for p in range(20)])
    assert low < controller.value + 0.02 < 0.9
    for _ in range(5):
        controller.learn(dict.fromkeys(range(20), 1), guesses)
    assert controller.value == 0.9


def test_guesses_far_below_the_threshold_say_nothing() -> None:
    controller = auto()
    controller.learn({}, [(1, 7, 0.3)])
    controller.learn({1: 8}, [])
    controller.learn({1: 7}, [])
    assert controller.value == 0.9


def test_guesses_of_a_block_that_is_over_are_forgotten_and_a_copy_learns_for_itself() -> None:
    controller = auto()
    controller.learn({}, [(1, 7, 0.85)])
    twin = controller.copy()
    controller.forget_guesses()
    controller.learn({1: 7}, [])
    twin.learn({1: 7}, [])
    assert controller.value == 0.9
    assert twin.value == pytest.approx(0.89)


def test_only_a_request_that_allows_it_gets_a_lower_threshold_in_a_full_step() -> None:
    span = Span(1, (M,), 0, 1, 1, (0,), Read.DENOISE, denoise=Denoise(0, 1, 0, 1, (0, 1), threshold=0.8))
    selector = make_diffusion("auto", Topology.BLOCK_CAUSAL, values={"load": 0.5}).selector
    assert under_load(span, selector, 0.0) == span
    lower = under_load(span, selector, 0.4).denoise
    assert lower is not None
    assert lower.threshold == pytest.approx(0.6)
    assert under_load(span, make_diffusion("auto", Topology.BLOCK_CAUSAL).selector, 0.4) == span


def test_a_policys_own_numbers_are_those_of_its_selector_whatever_its_planner_is() -> None:
    how = make_diffusion("llada2", Topology.BLOCK_CAUSAL, {"planner": "adablock"})
    assert (how.selector["threshold"], how.planner["threshold"]) == (0.95, 0.3)

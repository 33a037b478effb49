"""What proposing costs: a crowd's price must not be guessed from single ones that are tried."""

from __future__ import annotations

import pytest

from scheduler.draft_cost import DraftCost


def test_what_many_cost_is_not_guessed_from_single_ones() -> None:
    """A crowd whose first one seemed to be paid for by each would never be tried."""
    cost = DraftCost()
    for number in range(200):
        cost.observe(1, 0, 2e-4 + 1e-5 * (number % 3))
    assert cost.predict(32, 0) < 3e-4
    for _ in range(80):
        cost.observe(8, 0, 9e-4)
    assert cost.predict(32, 0) == pytest.approx(2e-4 + 31 * 1e-4, rel=0.1)


def test_what_was_not_seen_for_long_is_no_price_of_each_answer() -> None:
    cost = DraftCost()
    for number in range(200):
        unseen = (1, 60, 120)[number % 3]
        cost.observe(1 + number % 2, 0, 1e-4 + 2e-5 * (number % 2) + 4e-6 * unseen, num_unseen=unseen)
    assert sum(cost.parts(0)) == pytest.approx(1e-4 + 4e-6, rel=0.1)
    assert cost.predict(1, 0, num_unseen=100) - cost.predict(1, 0) == pytest.approx(4e-4, rel=0.1)


def test_mask_rows_cost_something_once_and_something_each() -> None:
    cost = DraftCost()
    for number in range(300):
        num_masks = (0, 4, 16)[number % 3]
        cost.observe(1 + number % 4, 0, 1e-4 + (3e-4 if num_masks else 0.0) + 1e-5 * num_masks, num_masks)
    any_s, each_s = cost.mask_parts
    assert any_s == pytest.approx(3e-4, rel=0.1)
    assert each_s == pytest.approx(1e-5, rel=0.2)

"""How late steps come, and whose lateness counts."""

from __future__ import annotations

import pytest

from scheduler.lateness import Lateness


def test_it_is_what_nearly_all_steps_kept_to() -> None:
    lateness = Lateness(0.99, unknown=1.5)
    assert lateness.factor == 1.5
    for number in range(512):
        lateness.observe(1.0, 3.0 if number % 50 == 0 else 1.1)
    assert lateness.factor == 3.0


@pytest.mark.parametrize(("every", "factor"), [(50, 1.1), (1, 3.0)], ids=["trials", "all draft"])
def test_steps_that_draft_count_where_most_do(every: int, factor: float) -> None:
    """A few trials, later than others, would be the slowest hundredth, and prompts would go in smaller pieces."""
    lateness = Lateness(0.99, unknown=1.5)
    for number in range(512):
        is_drafting = number % every == 0
        lateness.observe(1.0, 3.0 if is_drafting else 1.1, is_drafting)
    assert lateness.factor == factor

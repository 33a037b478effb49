"""Looks at who might be asked for drafts become rarer while nobody is, and come at once where that may have changed."""

from __future__ import annotations

from scheduler.lookout import Lookout


def looks(lookout: Lookout, num_steps: int, num_decodes: int = 16, has_asked: bool = False) -> list[int]:
    """Steps at which somebody looks, of so many."""
    found = []
    for step in range(num_steps):
        if lookout.is_due(num_decodes):
            found.append(step)
            lookout.saw(has_asked)
    return found


def test_a_look_in_vain_is_followed_by_more_steps_without_one_each_time() -> None:
    assert looks(Lookout(), 120) == [0, 8, 24, 56, 88]


def test_where_somebody_is_asked_every_step_is_looked_at() -> None:
    assert looks(Lookout(), 5, has_asked=True) == [0, 1, 2, 3, 4]


def test_steps_without_a_look_are_counted() -> None:
    lookout = Lookout()
    looks(lookout, 8)
    assert lookout.is_due(16)
    assert lookout.num_skipped == 7
    lookout.saw(False)
    assert lookout.num_skipped == 0


def test_half_the_decodes_or_one_that_was_asked_end_the_rest() -> None:
    lookout = Lookout()
    looks(lookout, 30)
    assert looks(lookout, 3, num_decodes=9) == []
    assert looks(lookout, 3, num_decodes=8) == [0]
    lookout.wake()
    assert looks(lookout, 10, num_decodes=8) == [0, 8]

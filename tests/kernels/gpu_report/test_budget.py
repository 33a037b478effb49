"""The time of a report, on a clock that the test sets."""

from __future__ import annotations

from kernels.gpu_report.budget import Budget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_section_ends_at_its_share_and_names_what_it_left_out() -> None:
    clock = Clock()
    section = Budget(100, clock).section("cases", until=0.5)
    done = []
    for item in section.each("abcdefg", lambda name: name):
        done.append(item)
        clock.now += 15
    # 45 s are over after three; a fourth would take as long as the longest so far and end at 60.
    assert done == ["a", "b", "c"]
    assert section.left_out == ["d", "e", "f", "g"]
    assert section.seconds == 45


def test_time_that_a_section_leaves_is_the_next_ones() -> None:
    clock = Clock()
    budget = Budget(100, clock)
    first = budget.section("checks", until=0.3)
    with first.item():
        clock.now += 5
    assert budget.section("cases", until=0.6).remaining == 55
    assert budget.remaining == 95


def test_a_short_item_runs_where_the_longest_no_longer_fits_only_if_it_may_be_as_long() -> None:
    clock = Clock()
    section = Budget(100, clock).section("cases", until=1.0)
    with section.item():
        clock.now += 60
    assert not section.fits("another")
    assert section.left_out == ["another"]


def test_an_item_that_fails_has_taken_its_time() -> None:
    clock = Clock()
    section = Budget(100, clock).section("cases", until=1.0)
    try:
        with section.item():
            clock.now += 70
            raise ValueError
    except ValueError:
        pass
    assert section.seconds == 70
    assert not section.fits("next")

"""What offers are worth: each by itself, and what verifying costs once a step by all together."""

from __future__ import annotations

import pytest

from scheduler.goodput import Marginal, Outlook
from scheduler.savings import savings


def outlook(once_s: float, row_s: float, num: int = 8, bound_s: float = 1.0, room: int = 100) -> Outlook:
    """A step of `num` decodes takes a second a token; drafts take `once_s` and `row_s` each."""
    return Outlook(
        value=num,
        room=room,
        backlog=0,
        price=0.0,
        seconds=lambda drafts, rows: num * 1.0 + (once_s if drafts else 0.0) + row_s * drafts,
        draft_bound_s=num + bound_s,
    )


def test_an_offer_is_worth_its_tokens_less_its_rows_and_its_share() -> None:
    offers = [[0.9, 0.5, 0.1], [0.15]]
    step = outlook(once_s=0.0, row_s=0.2, bound_s=10.0)
    found = savings(offers, Marginal(8).allocate(offers, step), step, token_s=1.0, row_s=0.2, share_s=0.3)
    assert found[0].tokens == pytest.approx(1.4)
    assert found[0].seconds == pytest.approx(1.4 - 0.4 - 0.3)
    assert found[1] == (0.0, 0.0)


def test_one_that_does_not_pay_alone_is_worth_what_it_is_among_many() -> None:
    """Of 8 streams one has an offer, which costs more than it saves: it is not verified, and yet worth asking."""
    offers, step = [[0.9, 0.8]], outlook(once_s=3.0, row_s=0.1, bound_s=10.0)
    allocation = Marginal(8).allocate(offers, step)
    assert allocation.lengths == [0]
    [found] = savings(offers, allocation, step, token_s=1.0, row_s=0.1, share_s=3.0 / 8)
    assert found.tokens == pytest.approx(1.7)
    assert found.seconds == pytest.approx(1.7 - 0.2 - 3.0 / 8)


@pytest.mark.parametrize("limits", [{"bound_s": 1.0}, {"room": 6, "bound_s": 10.0}], ids=["no time", "no rows"])
def test_without_room_for_all_those_count_that_had_some(limits: dict[str, float]) -> None:
    offers = [[0.9] * 6, [0.8] * 6]
    step = outlook(once_s=0.0, row_s=0.2, **limits)  # type: ignore[arg-type]
    allocation = Marginal(8).allocate(offers, step)
    assert 0 < sum(allocation.lengths) <= 6
    found = savings(offers, allocation, step, token_s=1.0, row_s=0.2, share_s=0.0)
    assert [one.tokens for one in found] == [
        pytest.approx(0.9 * allocation.lengths[0]),
        pytest.approx(0.8 * allocation.lengths[1]),
    ]

"""Which denoise spans a step takes: like drafts, query rows bought for the tokens that they are expected to finish.

The difference to drafts (goodput.py): a span is whole or not at all, and a request that is passed over is not served in
another way meanwhile. So each is due after it was passed over a few times in a row, the longest first (deficit round
robin, in steps), and at least one span is always taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple


class SpanOffer(NamedTuple):
    """The next span of one sequence.

    narrow, wide   its rows: as few as it can do with, as many as it can use
    yield_per_row  output tokens that a row of this request is expected to finish
    num_passed     steps in a row that went without it; is_due: so many that what it yields no longer matters
    """

    narrow: int
    wide: int
    yield_per_row: float
    num_passed: int = 0
    is_due: bool = False


def buy_spans(
    offers: Sequence[SpanOffer],
    value: float,
    room: int,
    seconds: Callable[[int, int], float],
    bound_s: float = inf,
) -> list[int]:
    """Rows of each offer that the step takes: narrow, wide, or 0.

    value     expected output tokens of the step without these offers
    room      rows they may take (R1)
    seconds   predicted time of the step with (spans, rows of them)
    bound_s   longest it may take with more than one of them
    Those due come first, the longest passed over first; the rest by yield, as long as tokens per second rise.
    """
    order = sorted(range(len(offers)), key=lambda i: _rank(offers[i]))
    rows = [0] * len(offers)
    num_spans = taken = 0
    goodput = value / time_s if (time_s := seconds(0, 0)) > 0.0 else 0.0
    for index in order:
        offer = offers[index]
        for width in (offer.wide, offer.narrow):
            if width > room - taken:
                continue
            time_s = seconds(num_spans + 1, taken + width)
            new_value = value + width * offer.yield_per_row
            new_goodput = new_value / time_s if time_s > 0.0 else inf
            must = num_spans == 0 and width == offer.narrow
            if not must and (time_s > bound_s or (new_goodput < goodput and not offer.is_due)):
                continue
            rows[index] = width
            num_spans, taken, value, goodput = num_spans + 1, taken + width, new_value, new_goodput
            break
    return rows


def _rank(offer: SpanOffer) -> tuple[int, float, int]:
    return (-offer.num_passed if offer.is_due else 0, -offer.yield_per_row, -offer.num_passed)

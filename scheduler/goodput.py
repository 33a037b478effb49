"""How many of the offered drafts are verified: the tokens per second that a step is expected to finish, at their most.

A draft is worth its survival: the probability that it is reached and accepted. Survivals never rise along an offer, so
the best S slots of all requests are a prefix of each offer, and the step's time depends on S and on the prompt rows
next to them only. `Marginal` tries every S, each with as many prompt rows as still fit, a prompt row being worth
`price` tokens: without it drafts that displace prompts look free, prompts starve and latency explodes.

Source: speculative reference 3.4 (SmartSpec, Liu et al. 2024, made marginal and joint with prefill), 3.5.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf
from typing import NamedTuple, Protocol

from scheduler.types import SpeculationSettings

_EVERY = 48
"""Up to this many values of S are all tried; beyond, a grid of about as many, then finer ones around the best."""


class Outlook(NamedTuple):
    """What a step can be.

    value        expected output tokens without these offers: one for each decode
    room         rows that drafts and prompts may take (R1)
    backlog      prompt rows that wait for a step; the first `fewest` of them go before any draft
    price        of a prompt row, in output tokens
    seconds      predicted time of the step with (drafts, prompt rows)
    bound_s      longest it may take with prompt rows beyond the first `fewest`
    draft_bound_s   longest it may take with drafts
    """

    value: float
    room: int
    backlog: int
    price: float
    seconds: Callable[[int, int], float]
    bound_s: float = inf
    fewest: int = 0
    draft_bound_s: float = inf


class Allocation(NamedTuple):
    """What the step will be.

    lengths   drafts verified of each offer
    prefill   prompt rows planned next to them
    goodput   tokens per second, prompt rows at their price
    cutoff    survival at which one draft more would just pay; 1 where none can be had
    plain     (value, seconds) of the step without any of the offers
    """

    lengths: list[int]
    prefill: int
    goodput: float
    cutoff: float = 1.0
    plain: tuple[float, float] = (0.0, 0.0)


Offers = Sequence[Sequence[float]]
"""Per request the survivals of its drafts, never rising."""


class DraftPolicy(Protocol):
    """Chooses how many of each offer's drafts are verified.

    is_selective   drafts are only asked for where they have paid so far; otherwise always
    """

    is_selective: bool

    def most(self, num_decodes: int) -> int:
        """Most drafts of one sequence while so many decode."""
        ...

    def allocate(self, offers: Offers, outlook: Outlook) -> Allocation: ...


class Marginal:
    """The S slots most likely to survive, for the S of most goodput."""

    is_selective = True

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts

    def most(self, num_decodes: int) -> int:
        return self._max_drafts

    def allocate(self, offers: Offers, outlook: Outlook) -> Allocation:
        slots = sorted([s for offer in offers for s in offer], reverse=True)
        most = max(0, min(len(slots), outlook.room - outlook.fewest))
        values = list(accumulate(slots[:most], initial=outlook.value))
        search = _Search(values, outlook)
        count = search.best(most)
        cutoff = _cutoff(outlook, count, values[count], search.goodput)
        return Allocation(_lengths(offers, slots, count), search.prefill, search.goodput, cutoff, search.plain)


class Uniform:
    """One number for all, that of most goodput: the paper's tractable form."""

    is_selective = True

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts

    def most(self, num_decodes: int) -> int:
        return self._max_drafts

    def allocate(self, offers: Offers, outlook: Outlook) -> Allocation:
        best, plain = Allocation([0] * len(offers), 0, -inf), (0.0, 0.0)
        for k in range(1 + max((len(offer) for offer in offers), default=0)):
            lengths = [min(k, len(offer)) for offer in offers]
            count = sum(lengths)
            if count > max(0, outlook.room - outlook.fewest):
                break
            value = outlook.value + sum(sum(offer[:k]) for offer in offers)
            prefill, seconds = _prefill(outlook, count, outlook.backlog)
            goodput = _ratio(value + outlook.price * prefill, seconds)
            plain = plain if k else (value + outlook.price * prefill, seconds)
            if (count == 0 or seconds <= outlook.draft_bound_s) and goodput > best.goodput:
                best = Allocation(lengths, prefill, goodput, _cutoff(outlook, count, value, goodput), plain)
        return best


class Fixed:
    """As many as are offered, up to `max_drafts`, or up to what a table says for the number of decodes."""

    is_selective = False

    def __init__(self, max_drafts: int, table: Sequence[tuple[int, int]] = ()) -> None:
        self._max_drafts = max_drafts
        self._sizes = [most_decodes for most_decodes, _ in table]
        self._lengths = [min(drafts, max_drafts) for _, drafts in table]

    def most(self, num_decodes: int) -> int:
        if not self._sizes:
            return self._max_drafts
        row = bisect_right(self._sizes, num_decodes - 1)
        return self._lengths[row] if row < len(self._lengths) else 0

    def allocate(self, offers: Offers, outlook: Outlook) -> Allocation:
        room = max(0, outlook.room - outlook.fewest)
        lengths = []
        value = outlook.value
        for offer in offers:
            length = min(len(offer), room)
            room -= length
            value += sum(offer[:length])
            lengths.append(length)
        prefill, seconds = _prefill(outlook, sum(lengths), outlook.backlog)
        return Allocation(lengths, prefill, _ratio(value + outlook.price * prefill, seconds))


def make_policy(settings: SpeculationSettings) -> DraftPolicy:
    """Raises ValueError for a name that is none, and for a table that is not ascending."""
    if settings.max_drafts < 1:
        raise ValueError(f"max_drafts is {settings.max_drafts}; at least 1 is needed (speculation off = no settings)")
    if settings.policy == "marginal":
        return Marginal(settings.max_drafts)
    if settings.policy == "uniform":
        return Uniform(settings.max_drafts)
    if settings.policy == "fixed":
        return Fixed(settings.max_drafts)
    if settings.policy != "table":
        raise ValueError(f"policy is {settings.policy!r}; it is marginal, uniform, fixed or table")
    sizes = [most_decodes for most_decodes, _ in settings.table]
    if not sizes or sizes != sorted(set(sizes)) or any(drafts < 0 for _, drafts in settings.table):
        raise ValueError(f"table is {settings.table!r}; it needs rows (most decodes, drafts >= 0), ascending")
    return Fixed(settings.max_drafts, settings.table)


def saved_seconds(allocation: Allocation, outlook: Outlook, draft_s: float) -> float:
    """What the drafts of a step save: the time in which plain steps would bring as much, less the step's own.

    draft_s  the share of proposing in `outlook.seconds`, which plain steps do without; the step's own is not taken off
    """
    value, plain_s = allocation.plain
    step_s = outlook.seconds(sum(allocation.lengths), allocation.prefill)
    return allocation.goodput * step_s * (plain_s - draft_s) / value - (step_s - draft_s) if value else 0.0


class _Search:
    """The S of most goodput, given the value of the best S slots for each S."""

    def __init__(self, values: Sequence[float], outlook: Outlook) -> None:
        self._values = values
        self._outlook = outlook
        self.goodput = -inf
        self.plain = (0.0, 0.0)
        self.prefill = 0
        self._count = 0

    def best(self, most: int) -> int:
        """Every S while there are few; else a grid, and grids around its best point until every S there was tried.

        The value is concave in S and the time convex, or nearly so: goodput has one peak.
        """
        low, high = 0, most
        while True:
            step = max(1, -(-(high - low) // _EVERY))
            self._scan(low, high, step)
            if step == 1:
                return self._count
            low, high = max(0, self._count - step), min(most, self._count + step)

    def _scan(self, low: int, high: int, step: int) -> None:
        outlook = self._outlook
        values, seconds, price, bound_s = self._values, outlook.seconds, outlook.price, outlook.draft_bound_s
        most_prefill = outlook.backlog
        for count in [*range(low, high, step), high]:
            if most_prefill:
                most_prefill, time_s = _prefill(outlook, count, most_prefill)
            else:
                time_s = seconds(count, 0)
            if time_s > bound_s and count:
                break
            value = values[count] + price * most_prefill
            goodput = _ratio(value, time_s)
            if count == 0:
                self.plain = value, time_s
            if goodput > self.goodput:
                self.goodput, self.prefill, self._count = goodput, most_prefill, count


def _prefill(outlook: Outlook, count: int, most: int) -> tuple[int, float]:
    """Most prompt rows, up to `most`, that fit next to `count` drafts, and the time of that step."""
    high = max(0, min(most, outlook.room - count))
    seconds = outlook.seconds
    time_s = seconds(count, high)
    low = min(outlook.fewest, high)
    if time_s <= outlook.bound_s or high == low:
        return high, time_s
    while low < high:
        middle = (low + high + 1) // 2
        if seconds(count, middle) <= outlook.bound_s:
            low = middle
        else:
            high = middle - 1
    return low, seconds(count, low)


def _cutoff(outlook: Outlook, count: int, value: float, goodput: float) -> float:
    """The survival that one draft beyond `count`, worth `value`, must have to keep up `goodput`."""
    if count + 1 > outlook.room - outlook.fewest:
        return 1.0
    prefill, seconds = _prefill(outlook, count + 1, outlook.backlog)
    if seconds > outlook.draft_bound_s:
        return 1.0
    return min(1.0, max(0.0, goodput * seconds - value - outlook.price * prefill))


def _ratio(value: float, seconds: float) -> float:
    return value / seconds if seconds > 0.0 else 0.0


def _lengths(offers: Offers, slots: Sequence[float], count: int) -> list[int]:
    """How many of the best `count` slots each offer holds."""
    if count == 0:
        return [0] * len(offers)
    cutoff = slots[count - 1]
    lengths = []
    for offer in offers:
        length = 0
        for survival in offer:
            if survival < cutoff:
                break
            length += 1
        lengths.append(length)
    # Slots as good as the last one that are too many: they are at the end of their offers.
    surplus = sum(lengths) - count
    row = len(offers)
    while surplus > 0:
        row -= 1
        while surplus > 0 and lengths[row] and offers[row][lengths[row] - 1] == cutoff:
            lengths[row] -= 1
            surplus -= 1
    return lengths

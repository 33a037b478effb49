"""The time of one run, shared out among its sections. The clock is given, so that tests need not wait.

A section ends at a share of the whole; what it leaves is the next one's. Nothing that has begun is interrupted here, so
an item is begun only if the longest one of its section so far would still fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Clock = Callable[[], float]


class Budget:
    """Seconds of a run from now on."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self.seconds, self._clock = seconds, clock
        self._started_at = clock()

    @property
    def elapsed(self) -> float:
        return self._clock() - self._started_at

    @property
    def remaining(self) -> float:
        return self.seconds - self.elapsed

    def section(self, name: str, until: float) -> Section:
        """A section that ends when the share `until` of the whole run is over, however late it begins."""
        return Section(name, self, self.seconds * until)


class Section:
    """Which items of one section still fit. `left_out` names those that did not, `seconds` what the rest took."""

    def __init__(self, name: str, budget: Budget, ends_at: float) -> None:
        self.name, self._budget, self._ends_at = name, budget, ends_at
        self.left_out: list[str] = []
        self.seconds = 0.0
        self._longest = 0.0

    @property
    def remaining(self) -> float:
        return self._ends_at - self._budget.elapsed

    def fits(self, item: str) -> bool:
        """Whether the item may begin; if not it is written down as left out."""
        fits = self.remaining > self._longest
        if not fits:
            self.left_out.append(item)
        return fits

    @contextmanager
    def item(self) -> Iterator[None]:
        """Around the work on one item, whether it succeeds or not."""
        start = self._budget.elapsed
        try:
            yield
        finally:
            took = self._budget.elapsed - start
            self.seconds += took
            self._longest = max(self._longest, took)

    def each(self, items: Iterable[T], name: Callable[[T], str]) -> Iterator[T]:
        """The items that fit, one after another; the others are left out by name."""
        for item in items:
            if self.fits(name(item)):
                with self.item():
                    yield item

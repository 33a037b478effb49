"""What a step takes beside the worker's own time: planning, deltas, sending, the next drain. Learned from the times at
which the engine comes back for its next plan.

Drafts save `plain_s`, what any step takes, once for every token they bring: a plan that leaves it out buys too few of
them where steps are short. `extra`, what more a step with drafts takes, is a price of asking: a part is paid once, a
part for each sequence.
"""

from __future__ import annotations

from math import inf

from scheduler.regression import NonNegativeRidge

_RATE = 0.05
_CLIP = 3.0
_FIT_EVERY, _SWEEPS = 8, 8
_UNIT_S = 1e-3


class HostCost:
    """Recent means of the host's seconds of a step; 0 until one was observed."""

    def __init__(self) -> None:
        self._plain_s = inf
        self._extra = NonNegativeRidge((1.0, 0.1), forgetting=0.98)
        self._num_drafting = 0

    @property
    def plain_s(self) -> float:
        return self._plain_s if self._plain_s < inf else 0.0

    @property
    def extra(self) -> tuple[float, float]:
        """What drafting adds to a step: once, and for each sequence that is asked or has drafts verified."""
        once_s, each_s = self._extra.coefficients
        return once_s, each_s

    def observe(self, seconds: float, num_drafting: int) -> None:
        """Learn from a step. Far more than expected (the engine waited, a neighbour took the core) is clipped.

        num_drafting  sequences that were asked for drafts or had some verified
        """
        if seconds < 0.0:
            return
        if self._plain_s == inf:
            self._plain_s = seconds
        terms = (1.0, float(num_drafting))
        extra_s = self._extra.predict(terms) if num_drafting else 0.0
        more_s = min(seconds, _CLIP * (self._plain_s + extra_s)) - self._plain_s
        # A step with drafts that was as fast as a plain one tells that plain ones have become faster.
        if num_drafting and more_s > 0.0:
            self._num_drafting += 1
            self._extra.accumulate(terms, more_s, _UNIT_S)
            if self._num_drafting <= _FIT_EVERY or self._num_drafting % _FIT_EVERY == 0:
                self._extra.fit(_SWEEPS)
        else:
            # The first sample may be far off, so what is lower counts for more.
            self._plain_s += (_RATE if more_s > 0.0 else 2 * _RATE) * more_s

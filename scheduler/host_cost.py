"""What a step takes beside the worker's own time: planning, deltas, sending, the next drain. Learned from the times at
which the engine comes back for its next plan.

Drafts save `plain_s`, what any step takes, once for every token they bring: a plan that leaves it out buys too few of
them where steps are short. `extra_s`, what more a step with drafts takes, is a price of asking.
"""

from __future__ import annotations

from math import inf

_RATE = 0.05
_CLIP = 3.0


class HostCost:
    """Recent means of the host's seconds of a step; 0 until one was observed."""

    def __init__(self) -> None:
        self._plain_s = inf
        self.extra_s = 0.0

    @property
    def plain_s(self) -> float:
        return self._plain_s if self._plain_s < inf else 0.0

    def observe(self, seconds: float, is_drafting: bool) -> None:
        """Learn from a step. Far more than expected (the engine waited, a neighbour took the core) is clipped."""
        if seconds < 0.0:
            return
        if self._plain_s == inf:
            self._plain_s = seconds
        more_s = min(seconds, _CLIP * (self._plain_s + self.extra_s)) - self._plain_s
        # A step with drafts that was as fast as a plain one tells that plain ones have become faster.
        if is_drafting and more_s > 0.0:
            self.extra_s += _RATE * (more_s - self.extra_s)
        else:
            # The first sample may be far off, so what is lower counts for more.
            self._plain_s += (_RATE if more_s > 0.0 else 2 * _RATE) * more_s

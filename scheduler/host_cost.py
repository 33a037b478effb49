"""What a step takes beside the worker's own time: planning, deltas, sending, the next drain. Learned from the times at
which the engine comes back for its next plan.

Drafts save `plain_s`, what any step takes, once for every token they bring: a plan that leaves it out buys too few of
them where steps are short. What more a step with drafts takes has two parts, each paid once and again for every one:
`asking` is a price of being asked, whatever comes of it; `verifying_s` is borne by the drafts that are verified. An
answer in vain costs the first alone, less than half of both. Prompts are told apart as well: no draft saves what
admitting them takes, and where texts are short that is part of every third step.
"""

from __future__ import annotations

from math import inf

from scheduler.regression import NonNegativeRidge

_RATE = 0.05
_DOUBT, _MANY = 2.0, 8.0
"""Steps that asked, and sequences or drafts beyond the first, that once were observed to cost nothing."""
_CLIP = 3.0
_NUM_EARLY, _FIT_EVERY, _SWEEPS = 64, 8, 8
_STALE, _STALE_EARLY, _FEW = 128, 16, 3
_UNIT_S = 1e-3


class HostCost:
    """Recent means of the host's seconds of a step; 0 until one was observed."""

    def __init__(self) -> None:
        self._plain_s = inf
        # A stratum for steps that asked, that verified, that did both or neither: the common kind must not drown what
        # the others tell of the parts. While there is nothing but both, verifying is charged with it: drafts that are
        # verified can be found not to pay, an answer in vain that seems dear is not asked for again. And what
        # is beyond the first costs nothing until many tell otherwise: see `DraftCost`.
        self._extra = NonNegativeRidge((1.0, 0.1, 1.0, 0.1, 1.0), num_strata=5, forgetting=0.98)
        for doubt in ((0, _MANY, 0, 0, 0), (0, 0, _DOUBT, 0, 0), (0, 0, 0, _MANY, 0)):
            self._extra.accumulate(doubt, 0.0, _UNIT_S, 4)
        self._num_observed = self._num_plain = self._num_since = 0

    @property
    def is_stale(self) -> bool:
        """Many steps have gone by without a plain one: what drafts save should be measured again, or those that do not
        pay may seem to for ever."""
        return self._num_since >= (_STALE_EARLY if self._num_plain < _FEW else _STALE)

    @property
    def plain_s(self) -> float:
        return self._plain_s if self._plain_s < inf else 0.0

    @property
    def asking(self) -> tuple[float, float]:
        """What asking adds to a step: once, and for each sequence that is asked."""
        _, _, first_s, each_s, _ = self._extra.coefficients
        return max(0.0, first_s - each_s), each_s

    def verifying_s(self, num_drafts: int) -> float:
        """What verifying so many drafts adds to a step."""
        first_s, each_s, _, _, _ = self._extra.coefficients
        return first_s + each_s * (num_drafts - 1) if num_drafts else 0.0

    def observe(self, seconds: float, num_asked: int = 0, num_verified: int = 0, has_prompts: bool = False) -> None:
        """Learn from a step. Far more than expected (the engine waited, a neighbour took the core) is clipped.

        num_asked  sequences that were asked for drafts; num_verified drafts that were verified
        """
        seconds = max(0.0, seconds)  # a difference of two clock readings: rounding may leave less than nothing
        if self._plain_s == inf:
            self._plain_s = seconds
        kind = (num_asked > 0) + 2 * (num_verified > 0)
        is_plain = not kind and not has_prompts
        self._num_since = 0 if is_plain else self._num_since + 1
        self._num_plain += is_plain
        # The first one apart: see `DraftCost`.
        asked, verified = num_asked > 0, num_verified > 0
        terms = (verified, num_verified - verified, asked, num_asked - asked, has_prompts)
        extra_s = self._extra.predict(terms)
        more_s = min(seconds, _CLIP * (self._plain_s + extra_s)) - self._plain_s
        if not is_plain:
            self._num_observed += 1
            self._extra.accumulate(terms, max(0.0, more_s), _UNIT_S, kind)
            if self._num_observed <= _NUM_EARLY or self._num_observed % _FIT_EVERY == 0:
                self._extra.fit(_SWEEPS)
        # A step with more work that was as fast as a plain one tells that plain ones have become faster.
        if is_plain or more_s <= 0.0:
            # The first sample may be far off, so what is lower counts for more, and the first plain ones for most.
            rate = _RATE if more_s > 0.0 else 2 * _RATE
            self._plain_s += (max(rate, 1.0 / self._num_plain) if is_plain else rate) * more_s

"""What a step takes beside the worker's own time: planning, deltas, sending, the next drain. Learned from the times at
which the engine comes back for its next plan.

    seconds = h0 + h1 decodes,    both >= 0

Drafts save it, once for every token they bring, so a plan that leaves it out buys too few of them where steps are
short. What drafts themselves cost here is little, and too seldom seen apart from noise to have a term: one bad sample
would end drafting, and with it the samples that could put it right.
"""

from __future__ import annotations

from scheduler.regression import NonNegativeRidge

_UNIT_S = 1e-4
_NUM_EARLY, _CLIP, _FLOOR_S = 8, 3.0, 1e-4
_FIT_EVERY, _SWEEPS = 16, 8


class HostCost:
    """Predicts the host's seconds of a step; 0 until one was observed."""

    def __init__(self) -> None:
        self._model = NonNegativeRidge((1.0, 0.1))
        self._num_observed = 0

    def observe(self, num_decodes: int, seconds: float) -> None:
        """Learn from a step. Far more than expected (the engine waited, a neighbour took the core) is clipped."""
        if seconds < 0.0:
            return
        self._num_observed += 1
        if self._num_observed > _NUM_EARLY:
            seconds = min(seconds, _CLIP * max(self.predict(num_decodes), _FLOOR_S))
        self._model.accumulate((1.0, num_decodes), seconds, _UNIT_S)
        if self._num_observed <= _NUM_EARLY or self._num_observed % _FIT_EVERY == 0:
            self._model.fit(_SWEEPS)

    def predict(self, num_decodes: int) -> float:
        return self._model.predict((1.0, num_decodes))

"""What a step takes beside the worker's own time: planning, deltas, sending, the next drain. Learned from the times at
which the engine comes back for its next plan.

    seconds = h0 + h1 decodes + h2 drafts verified + h3 sequences asked for drafts,    all coefficients >= 0

Drafts save the first two, once a token, and cost the last two, so a plan that leaves it out buys too few of them where
a step is short, and asks too often.
"""

from __future__ import annotations

from typing import NamedTuple

from scheduler.regression import NonNegativeRidge

_UNIT_S = 1e-4
_NUM_EARLY, _CLIP, _FLOOR_S = 8, 3.0, 1e-4
_FIT_EVERY, _SWEEPS = 16, 8


class HostWork(NamedTuple):
    """What the host's time of a step depends on."""

    decodes: int = 0
    drafts: int = 0
    asked: int = 0


class HostCost:
    """Predicts the host's seconds of a step; 0 until one was observed."""

    def __init__(self) -> None:
        self._model = NonNegativeRidge((1.0, 0.1, 0.1, 0.1), forgetting=0.99)
        self._num_observed = 0

    def observe(self, work: HostWork, seconds: float) -> None:
        """Learn from a step. Far more than expected (the engine waited, a neighbour took the core) is clipped."""
        if seconds < 0.0:
            return
        self._num_observed += 1
        if self._num_observed > _NUM_EARLY:
            seconds = min(seconds, _CLIP * max(self.predict(work), _FLOOR_S))
        self._model.accumulate((1.0, *work), seconds, _UNIT_S)
        if self._num_observed <= _NUM_EARLY or self._num_observed % _FIT_EVERY == 0:
            self._model.fit(_SWEEPS)

    def predict(self, work: HostWork) -> float:
        return self._model.predict((1.0, *work))

    @property
    def per_draft(self) -> float:
        return self._model.coefficients[2]

    @property
    def per_asked(self) -> float:
        return self._model.coefficients[3]

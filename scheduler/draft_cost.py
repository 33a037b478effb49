"""Seconds that proposing takes in a step, learned from the steps that asked."""

from __future__ import annotations

from scheduler.regression import NonNegativeRidge

_UNIT_S = 1e-3
_NUM_CLIPPED, _CLIP, _FLOOR_S = 8, 2.0, 2e-5
_NUM_FITTED, _FIT_EVERY, _SWEEPS = 64, 8, 8
_DOUBT = 5.0
"""Sequences, or mask rows, that once were observed to cost nothing: it holds down what a few samples of more say."""


class DraftCost:
    """Seconds that proposing takes: of the first sequence and of each other one, for lookups and, times the depth, for
    model drafters; the reading of mask rows, what any take and each; and what is taken in of texts that drafters have
    not seen, as long as the time since the last answer.

    Not (1 + sequences): while single ones are tried, nothing tells what is paid once from what each costs, and a crowd
    whose first one seemed to be paid for by each would never be tried.
    """

    def __init__(self) -> None:
        self._model = NonNegativeRidge((1.0, 0.1, 0.2, 0.02, 1.0, 0.02, 0.02), num_strata=2, forgetting=0.97)
        # Until crowds tell otherwise, others than the first cost nothing: two that a neighbour disturbed would keep
        # them from being asked.
        for doubt in ((0, _DOUBT), (0, 0, 0, _DOUBT), (0, 0, 0, 0, 0, _DOUBT)):
            self._model.accumulate(doubt + (0,) * (7 - len(doubt)), 0.0, _UNIT_S, 1)
        self.num_observed = 0

    def observe(self, num_asked: int, depth: int, seconds: float, num_masks: int = 0, num_unseen: int = 0) -> None:
        """Learn from a step. What is far above the expected (a neighbour took the core) is clipped."""
        self.num_observed += 1
        if self.num_observed > _NUM_CLIPPED:
            expected_s = self.predict(num_asked, depth, num_masks, num_unseen)
            seconds = min(seconds, _CLIP * max(expected_s, _FLOOR_S))
        self._model.accumulate(_terms(num_asked, depth, num_masks, num_unseen), seconds, _UNIT_S)
        if self.num_observed <= _NUM_FITTED or self.num_observed % _FIT_EVERY == 0:
            self._model.fit(_SWEEPS)

    def predict(self, num_asked: int, depth: int, num_masks: int = 0, num_unseen: int = 0) -> float:
        return self._model.predict(_terms(num_asked, depth, num_masks, num_unseen)) if num_asked else 0.0

    def parts(self, depth: int) -> tuple[float, float]:
        """Seconds that are paid once, and those of each sequence, of which a token more is taken in."""
        first_s, each_s, first_deep_s, each_deep_s, _, _, unseen_s = self._model.coefficients
        each_s += depth * each_deep_s
        return max(0.0, first_s + depth * first_deep_s - each_s), each_s + unseen_s

    @property
    def mask_parts(self) -> tuple[float, float]:
        """Seconds that reading mask rows takes once, and those of each row."""
        return self._model.coefficients[4], self._model.coefficients[5]

    @property
    def unseen_s(self) -> float:
        """Seconds that taking in one token takes."""
        return self._model.coefficients[6]


def _terms(num_asked: int, depth: int, num_masks: int, num_unseen: int) -> tuple[float, ...]:
    return 1.0, num_asked - 1, depth, depth * (num_asked - 1), num_masks > 0, num_masks, num_unseen

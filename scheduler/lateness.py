"""How late steps come: a high quantile of measured over predicted time, over the steps of the last while.

A mean error says little about the late steps, which are what a stream's p99 is made of: on a machine that is shared,
the slowest hundredth of the steps takes twice as long as predicted while the mean error is a tenth.
"""

from __future__ import annotations

from collections import deque

_NUM_STEPS = 512
_EVERY = 32
_FEWEST = 64
_DRAFTING_RATE = 1 / 16


class Lateness:
    """`factor` times the prediction is what `share` of the recent steps kept to; `unknown` until there are enough."""

    def __init__(self, share: float, unknown: float) -> None:
        self._share = share
        self._ratios: deque[float] = deque(maxlen=_NUM_STEPS)
        self._num_until_due = _FEWEST
        self._drafting = 0.0
        self.factor = unknown

    def observe(self, predicted_s: float, measured_s: float, is_drafting: bool = False) -> None:
        """Note a step. Times that are not positive (nothing predicted, a clock that stood still) are ignored.

        So are steps that draft where few do: they are trials, later than others, and would be the slowest hundredth
        that all prompts make room for.
        """
        self._drafting += _DRAFTING_RATE * (is_drafting - self._drafting)
        if predicted_s <= 0.0 or measured_s <= 0.0 or (is_drafting and self._drafting < 0.5):
            return
        self._ratios.append(measured_s / predicted_s)
        self._num_until_due -= 1
        if self._num_until_due <= 0:
            # Sorting now and then costs less than keeping the window sorted at every step.
            self._num_until_due = _EVERY
            ratios = sorted(self._ratios)
            self.factor = ratios[min(len(ratios) - 1, int(self._share * len(ratios)))]

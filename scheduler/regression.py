"""Least squares with coefficients >= 0, fitted online with forgetting: what the time models share.

Non-negative, so that more work is never predicted to be faster. Samples are forgotten per stratum (a caller's choice of
kinds of steps): an hour of one kind must not wipe out what is known of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

_RIDGE = 1e-4
_MOST_WEIGHT = 1e60


class NonNegativeRidge:
    """value = sum of coefficients x terms, all coefficients >= 0.

    scale       per term, about the inverse of its usual size: one ridge constant then fits all
    forgetting  weight of a sample when the next one of its stratum arrives
    """

    def __init__(self, scale: Sequence[float], num_strata: int = 1, forgetting: float = 0.99) -> None:
        size = len(scale)
        self._scale = tuple(scale)
        self._forgetting = forgetting
        self._strata = [_Stratum(size) for _ in range(num_strata)]
        self._pace = 1.0
        self.coefficients = [0.0] * size

    def predict(self, terms: Sequence[float]) -> float:
        total: float = sum(map(mul, self.coefficients, terms))
        return total

    def accumulate(self, terms: Sequence[float], value: float, unit: float, stratum: int = 0) -> None:
        """Add a sample. Errors count in `unit`s: the predicted value itself makes them relative errors.

        (Dividing by the measured value would favour the small ones of noisy data.)
        """
        # Terms that are 0, most of them in a step of one kind, change nothing.
        row = [(i, x * s / unit) for i, (x, s) in enumerate(zip(terms, self._scale, strict=True)) if x]
        self._strata[stratum].add(row, value / (unit * self._pace), self._forgetting)

    def multiply(self, factor: float) -> None:
        """Everything takes `factor` times as long, also what has not been seen lately."""
        self.coefficients = [c * factor for c in self.coefficients]
        self._pace *= factor

    def fit(self, sweeps: int) -> None:
        """Coordinate descent from the last solution."""
        known = [stratum for stratum in self._strata if stratum.moment[0] or any(stratum.moment)]
        weights = [1.0 / stratum.weight for stratum in known]
        size = range(len(self._scale))
        live = [i for i in size if any(stratum.gram[i][i] > 0.0 for stratum in known)]
        lines = {
            i: [sum(map(mul, weights, column)) for column in zip(*(s.gram[i] for s in known), strict=True)]
            for i in live
        }
        moment = {i: self._pace * sum(w * s.moment[i] for w, s in zip(weights, known, strict=True)) for i in live}
        solution = [c / s for c, s in zip(self.coefficients, self._scale, strict=True)]
        for _ in range(sweeps):
            for i in live:
                line = lines[i]
                diagonal = line[i]
                rest = moment[i] - sum(map(mul, line, solution)) + diagonal * solution[i]
                solution[i] = max(0.0, rest / (diagonal * (1.0 + _RIDGE)))
        self.coefficients = [x * s for x, s in zip(solution, self._scale, strict=True)]


class _Stratum:
    """Sums over one kind of step. A newer sample weighs more instead of the older ones less: `weight` is the newest's,
    and what the sums are to be divided by."""

    def __init__(self, size: int) -> None:
        self.gram = [[0.0] * size for _ in range(size)]
        self.moment = [0.0] * size
        self.weight = 1.0

    def add(self, row: Sequence[tuple[int, float]], target: float, forgetting: float) -> None:
        self.weight /= forgetting
        if self.weight > _MOST_WEIGHT:
            self.gram = [[x / self.weight for x in line] for line in self.gram]
            self.moment = [x / self.weight for x in self.moment]
            self.weight = 1.0
        for i, left in row:
            left *= self.weight
            self.moment[i] += left * target
            line = self.gram[i]
            for j, right in row:
                line[j] += left * right

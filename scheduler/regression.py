"""Least squares with coefficients >= 0, fitted online with forgetting: what the time models share.

Non-negative, so that more work is never predicted to be faster. Samples are forgotten per stratum (a caller's choice of
kinds of steps): an hour of one kind must not wipe out what is known of another.
"""

from __future__ import annotations

from collections.abc import Sequence

_RIDGE = 1e-4


class NonNegativeRidge:
    """value = sum of coefficients x terms, all coefficients >= 0.

    scale       per term, about the inverse of its usual size: one ridge constant then fits all
    forgetting  weight of a sample when the next one of its stratum arrives
    """

    def __init__(self, scale: Sequence[float], num_strata: int = 1, forgetting: float = 0.99) -> None:
        size = len(scale)
        self._scale = tuple(scale)
        self._forgetting = forgetting
        self._gram = [[[0.0] * size for _ in range(size)] for _ in range(num_strata)]
        self._moment = [[0.0] * size for _ in range(num_strata)]
        self.coefficients = [0.0] * size

    def predict(self, terms: Sequence[float]) -> float:
        return sum(c * x for c, x in zip(self.coefficients, terms, strict=True))

    def accumulate(self, terms: Sequence[float], value: float, unit: float, stratum: int = 0) -> None:
        """Add a sample. Errors count in `unit`s: the predicted value itself makes them relative errors.

        (Dividing by the measured value would favour the small ones of noisy data.)
        """
        gram, moment, kept = self._gram[stratum], self._moment[stratum], self._forgetting
        row = [x * s / unit for x, s in zip(terms, self._scale, strict=True)]
        target = value / unit
        for i, left in enumerate(row):
            moment[i] = moment[i] * kept + left * target
            line = gram[i]
            gram[i] = [old * kept + left * right for old, right in zip(line, row, strict=True)]

    def multiply(self, factor: float) -> None:
        """Everything takes `factor` times as long, also what has not been seen lately."""
        self.coefficients = [c * factor for c in self.coefficients]
        self._moment = [[m * factor for m in part] for part in self._moment]

    def fit(self, sweeps: int) -> None:
        """Coordinate descent from the last solution."""
        gram = [[sum(column) for column in zip(*lines, strict=True)] for lines in zip(*self._gram, strict=True)]
        moment = [sum(column) for column in zip(*self._moment, strict=True)]
        solution = [c / s for c, s in zip(self.coefficients, self._scale, strict=True)]
        live = [i for i in range(len(solution)) if gram[i][i] > 0.0]
        for _ in range(sweeps):
            for i in live:
                line = gram[i]
                diagonal = line[i]
                rest = moment[i] - sum(g * x for g, x in zip(line, solution, strict=True)) + diagonal * solution[i]
                solution[i] = max(0.0, rest / (diagonal * (1.0 + _RIDGE)))
        self.coefficients = [x * s for x, s in zip(solution, self._scale, strict=True)]

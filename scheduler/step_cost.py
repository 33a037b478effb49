"""How long a step takes: a model fitted online to what the worker measures.

seconds = c0 + c1 tokens + sum_k h_k max(0, tokens - knot_k) + c2 decode_seqs + c3 context_tokens
          + c4 prefill_context, all coefficients >= 0

That is a convex curve in the rows of a step (weights are read once whatever the rows are, until arithmetic costs more)
plus the keys that are read. Non-negative, so that more work is never predicted to be faster and the budget can be found
by bisection. The coefficients are fitted to *relative* errors by ridge regression with forgetting, which is per size of
step (`_STRATA`): an hour of pure decoding must not wipe out what prefill costs. Besides, every step moves all of them a
little by one factor: when a neighbour takes half of the machine, steps not seen since are slower, too. One-sided
outliers (one step ten times longer) are clipped to what the spread of recent errors makes plausible.

Source: the linear form of SmartSpec (Liu et al. 2024) and Niyama's two regimes (split at 512 tokens). Departure:
several knots, because the knee depends on the machine, and the common factor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from scheduler.types import StepFeatures, StepSample

_KNOTS = (16, 64, 256)
_STRATA = (2, 8, 32, 64, 128, 256, 512)
_NUM_TERMS = 5 + len(_KNOTS)
_FORGETTING = 0.99
_PACE_RATE = 0.05
_RIDGE = 1e-4
_MIN_SPREAD = 0.1
_CLIP = 3.0
_SWEEPS = 6
_FIT_EVERY = 4
_NUM_EARLY = 50
_SEED_SWEEPS = 400
# Terms are scaled to about one each, so that one ridge constant fits all.
_SCALE = (1.0, 1e-2, 1e-2, 1e-4, 1e-5, *(1e-2 for _ in _KNOTS))


class StepCost:
    """Predicts the wall seconds of a step. Every number comes from `observe`; before the first, `predict` gives 0."""

    def __init__(self, samples: Iterable[StepSample] = ()) -> None:
        self._coefficients = [0.0] * _NUM_TERMS
        self._gram = [[[0.0] * _NUM_TERMS for _ in range(_NUM_TERMS)] for _ in range(len(_STRATA) + 1)]
        self._moment = [[0.0] * _NUM_TERMS for _ in range(len(_STRATA) + 1)]
        self._spread = _MIN_SPREAD
        self._mean_error: float | None = None
        self.num_observed = 0
        self.seed(samples)

    def seed(self, samples: Iterable[StepSample]) -> None:
        """Take profile samples, as they are, and fit thoroughly."""
        for features, seconds in samples:
            if seconds > 0:
                self._accumulate(features, seconds, seconds)
                self.num_observed += 1
        if self.num_observed:
            self._fit(_SEED_SWEEPS)

    @property
    def is_ready(self) -> bool:
        return self.num_observed > 0

    @property
    def mean_error(self) -> float:
        """Mean absolute percentage error of the predictions of recent steps, as a fraction (0.1 = 10 %)."""
        return self._mean_error or 0.0

    def predict(self, features: StepFeatures) -> float:
        """Expected wall seconds of a step."""
        return sum(c * x for c, x in zip(self._coefficients, _terms(features), strict=True))

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from a step that was just measured. Non-positive times (a clock that stood still) are ignored."""
        if seconds <= 0 or features.tokens < 1:
            return
        predicted = self.predict(features)
        if predicted > 0:
            error = seconds / predicted - 1.0
            self._mean_error = _ema(self._mean_error, abs(predicted - seconds) / seconds, 0.02)
            limit = _CLIP * self._spread
            self._spread = max(_MIN_SPREAD, _ema(self._spread, min(abs(error), limit), 0.05))
            seconds = min(seconds, predicted * (1.0 + limit))
            self._change_pace(1.0 + _PACE_RATE * (seconds / predicted - 1.0))
        self._accumulate(features, seconds, predicted or seconds)
        self.num_observed += 1
        if self.num_observed < _NUM_EARLY:
            self._fit(_SEED_SWEEPS // 10)
        elif self.num_observed % _FIT_EVERY == 0:
            self._fit(_SWEEPS)

    def largest_prefill(self, decodes: StepFeatures, start: int, most: int, target_s: float) -> int:
        """Most prompt rows, in [0, most], that join `decodes` within `target_s`; the prompt goes on at KV `start`."""
        low, high = 0, most
        while low < high:
            rows = (low + high + 1) // 2
            if self.predict(with_prefill(decodes, start, rows)) <= target_s:
                low = rows
            else:
                high = rows - 1
        return low

    def _change_pace(self, factor: float) -> None:
        """Every kind of step takes `factor` times as long, also those not seen lately: a neighbour came or left."""
        self._coefficients = [c * factor for c in self._coefficients]
        self._moment = [[m * factor for m in part] for part in self._moment]

    def _accumulate(self, features: StepFeatures, seconds: float, scale_s: float) -> None:
        """Add a sample. `scale_s` is the predicted time, so that 10 % weigh the same in a short and a long step.

        (Dividing by the measured time would favour the fast steps of noisy data.)
        """
        stratum = bisect_left(_STRATA, features.tokens)
        gram, moment = self._gram[stratum], self._moment[stratum]
        row = [x * s / scale_s for x, s in zip(_terms(features), _SCALE, strict=True)]
        target = seconds / scale_s
        for i, left in enumerate(row):
            moment[i] = moment[i] * _FORGETTING + left * target
            line = gram[i]
            for j, right in enumerate(row):
                line[j] = line[j] * _FORGETTING + left * right

    def _fit(self, sweeps: int) -> None:
        """Non-negative ridge regression by coordinate descent from the last solution."""
        span = range(_NUM_TERMS)
        gram = [[sum(column) for column in zip(*lines, strict=True)] for lines in zip(*self._gram, strict=True)]
        moment = [sum(column) for column in zip(*self._moment, strict=True)]
        solution = [c / s for c, s in zip(self._coefficients, _SCALE, strict=True)]
        for _ in range(sweeps):
            for i in span:
                diagonal = gram[i][i]
                if diagonal <= 0.0:
                    continue
                rest = moment[i] - sum(g * x for g, x in zip(gram[i], solution, strict=True)) + diagonal * solution[i]
                solution[i] = max(0.0, rest / (diagonal * (1.0 + _RIDGE)))
        self._coefficients = [x * s for x, s in zip(solution, _SCALE, strict=True)]


def with_prefill(decodes: StepFeatures, start: int, rows: int) -> StepFeatures:
    """`decodes` joined by `rows` prompt rows from KV index `start` on."""
    return StepFeatures(
        decodes.tokens + rows,
        decodes.prefill_tokens + rows,
        decodes.decode_seqs,
        decodes.context_tokens,
        decodes.prefill_context + rows * start + rows * (rows + 1) // 2,
    )


def _terms(features: StepFeatures) -> tuple[float, ...]:
    tokens = features.tokens
    hinges = (max(0, tokens - knot) for knot in _KNOTS)
    return (1.0, tokens, features.decode_seqs, features.context_tokens, features.prefill_context, *hinges)


def _ema(old: float | None, new: float, rate: float) -> float:
    return new if old is None else old + rate * (new - old)

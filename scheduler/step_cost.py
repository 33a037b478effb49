"""How long a step takes: a model fitted online to what the worker measures.

seconds = c0 + c1 tokens + sum_k h_k max(0, tokens - knot_k) + c2 decode_seqs + c3 context_tokens + c4 prefill_context
          + c5 judged + c6 draft_context + d (1 if there are drafts), all coefficients >= 0

That is, but for d, a convex curve in the rows of a step (weights are read once whatever the rows are, until arithmetic
costs more) plus the keys and the logits that are read. Non-negative, so that more work is never predicted to be faster
and the budget can be found by bisection. d is what any drafts cost at all: a step that verifies now and then is dearer
than its rows, and they would seem dear to those that draft in every step. The coefficients are fitted to *relative*
errors by ridge regression with forgetting, which is per size of step (`_STRATA`): an hour of pure decoding must not
wipe out what prefill costs. Besides, every step moves all of them a little by one factor: when a neighbour takes half
of the machine, steps not seen since are slower, too. One-sided outliers (one step ten times longer) are clipped to what
the spread of recent errors makes plausible.

Source: the linear form of SmartSpec (Liu et al. 2024) and Niyama's two regimes (split at 512 tokens). Departure:
several knots, because the knee depends on the machine, and the common factor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from scheduler.regression import NonNegativeRidge
from scheduler.types import StepFeatures, StepSample

_KNOTS = (16, 64, 128, 256)
_STRATA = (2, 8, 32, 64, 128, 256, 512)
_PACE_RATE = 0.05
_MIN_SPREAD = 0.1
_CLIP = 3.0
_SWEEPS = 6
_FIT_EVERY = 16
_NUM_EARLY = 50
_SEED_SWEEPS = 400
_SCALE = (1.0, 1.0, 1e-2, 1e-2, 1e-4, 1e-5, 1e-2, 1e-4, *(1e-2 for _ in _KNOTS))


class StepCost:
    """Predicts the wall seconds of a step. Every number comes from `observe`; before the first, `predict` gives 0."""

    def __init__(self, samples: Iterable[StepSample] = ()) -> None:
        self._model = NonNegativeRidge(_SCALE, len(_STRATA) + 1)
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
            self._model.fit(_SEED_SWEEPS)

    @property
    def is_ready(self) -> bool:
        return self.num_observed > 0

    @property
    def mean_error(self) -> float:
        """Mean absolute percentage error of the predictions of recent steps, as a fraction (0.1 = 10 %)."""
        return self._mean_error or 0.0

    def predict(self, features: StepFeatures) -> float:
        """Expected wall seconds of a step."""
        return self._model.predict(_terms(features))

    def observe(self, features: StepFeatures, seconds: float) -> float:
        """Learn from a step that was just measured. Returns what was expected of it.

        0 = nothing was learned: its time is not positive (a clock that stood still).
        """
        if seconds <= 0 or features.tokens < 1:
            return 0.0
        predicted = self.predict(features)
        if predicted > 0:
            error = seconds / predicted - 1.0
            self._mean_error = _ema(self._mean_error, abs(predicted - seconds) / seconds, 0.02)
            limit = _CLIP * self._spread
            self._spread = max(_MIN_SPREAD, _ema(self._spread, min(abs(error), limit), 0.05))
            seconds = min(seconds, predicted * (1.0 + limit))
            self._model.multiply(1.0 + _PACE_RATE * (seconds / predicted - 1.0))
        self._accumulate(features, seconds, predicted or seconds)
        self.num_observed += 1
        if self.num_observed < _NUM_EARLY:
            self._model.fit(_SEED_SWEEPS // 10)
        elif self.num_observed % _FIT_EVERY == 0:
            self._model.fit(_SWEEPS)
        return predicted

    def _accumulate(self, features: StepFeatures, seconds: float, unit: float) -> None:
        self._model.accumulate(_terms(features), seconds, unit, bisect_left(_STRATA, features.tokens))

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

    def curve(self, decodes: StepFeatures, start: int) -> Callable[[int, int], float]:
        """The predicted seconds of `decodes` joined by (drafts, prompt rows), as a function that takes about 1 us.

        Drafts are taken to stand over contexts of mean length; the prompt goes on at KV index `start`.
        """
        _, any_draft, per_token, _, _, per_prefill_key, per_judged, per_draft_key, *slopes = self._model.coefficients
        hinges = [(knot, slope) for knot, slope in zip(_KNOTS, slopes, strict=True) if slope > 0.0]
        rows_before = decodes.tokens
        base = self.predict(decodes) - sum(slope * max(0, rows_before - knot) for knot, slope in hinges)
        base -= per_token * rows_before
        per_draft = per_judged + per_draft_key * decodes.context_tokens / max(1, decodes.decode_seqs)
        any_drafts = 0.0 if decodes.draft_context else any_draft

        def seconds(num_drafts: int, num_prefill: int) -> float:
            rows = rows_before + num_drafts + num_prefill
            keys = num_prefill * (start + 0.5 * (num_prefill + 1))
            total = base + per_token * rows + per_draft * num_drafts + per_prefill_key * keys
            if num_drafts:
                total += any_drafts
            for knot, slope in hinges:
                if rows > knot:
                    total += slope * (rows - knot)
            return total

        return seconds

    def span_curve(self, decodes: StepFeatures, keys: int) -> Callable[[int, int], float]:
        """The predicted seconds of `decodes` joined by (denoise spans, rows of them), each over `keys` keys: a span is
        a decode of many rows, all judged."""
        _, any_draft, per_token, per_seq, per_key, _, per_judged, per_draft_key, *slopes = self._model.coefficients
        hinges = [(knot, slope) for knot, slope in zip(_KNOTS, slopes, strict=True) if slope > 0.0]
        before = decodes.tokens
        base = self.predict(decodes) - sum(slope * max(0, before - knot) for knot, slope in hinges)
        per_span = per_seq + per_key * keys - per_judged - per_draft_key * keys
        per_row = per_token + per_judged + per_draft_key * keys
        any_rows = 0.0 if decodes.draft_context else any_draft

        def seconds(num_spans: int, rows: int) -> float:
            total = base + per_span * num_spans + per_row * rows
            if rows > num_spans:
                total += any_rows
            for knot, slope in hinges:
                if before + rows > knot:
                    total += slope * (before + rows - knot)
            return total

        return seconds


def with_prefill(decodes: StepFeatures, start: int, rows: int) -> StepFeatures:
    """`decodes` joined by `rows` prompt rows from KV index `start` on."""
    return decodes._replace(
        tokens=decodes.tokens + rows,
        prefill_tokens=decodes.prefill_tokens + rows,
        prefill_context=decodes.prefill_context + rows * start + rows * (rows + 1) // 2,
    )


def _terms(features: StepFeatures) -> tuple[float, ...]:
    tokens, _, decode_seqs, context_tokens, prefill_keys, judged, draft_keys = features
    hinges = [tokens - knot if tokens > knot else 0 for knot in _KNOTS]
    # Its order is the order of the fit: what one drafted row cannot tell apart is charged to there being any.
    return (1.0, draft_keys > 0, tokens, decode_seqs, context_tokens, prefill_keys, judged, draft_keys, *hinges)


def _ema(old: float | None, new: float, rate: float) -> float:
    return new if old is None else old + rate * (new - old)

"""Fixed tokens that change: LLaDA2.1's edits and WINO's masks set again. Pure functions of a block's statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.types import Choice

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def edits(tokens: Ids, best: Ids, top: Floats, choice: Choice) -> Bools:
    """Which fixed tokens are replaced by the likeliest token: those that differ from it where it is sure enough.

    tokens  as they stand; best, top  the likeliest tokens and their probabilities
    Source: LLaDA2.1 (2026), joint threshold decoding. Departure: above temperature 0 an edit is still the likeliest
    token; with a drawn one a block would never come to rest.
    """
    changed: Bools = (best != tokens) & (top > choice["edit_threshold"])
    return changed


def narrow_out(given: Floats, num_fixed: int, choice: Choice) -> Bools:
    """Which fixed tokens are masked again: the least likely of those with probability < narrow, fewer than were fixed.

    given      probability of each token, as its shadow sees it: without the token itself
    num_fixed  masks fixed in this step
    Source: Hong et al., WINO (2025), narrow-out; the bound keeps the number of masks falling.
    """
    again = np.zeros(given.size, dtype=np.bool_)
    worst = np.argsort(given, kind="stable")[: max(0, num_fixed - 1)]
    again[worst] = given[worst] < choice["narrow"]
    return again

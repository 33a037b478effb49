"""Where a window ends, if the model's own prediction decides: AdaBlock."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from scheduler.types import Choice


def adablock(
    positions: NDArray[np.int64],
    best: NDArray[np.int64],
    top: NDArray[np.float32],
    default: int,
    delimiters: Collection[int],
    choice: Choice,
) -> int:
    """The end of a window that is all masks: behind the surest predicted delimiter, or `default`.

    positions  of the window's masks, with their likeliest tokens and probabilities
    Source: Lu et al., "AdaBlock-dLLM" (2025), algorithm 1. Of equally sure delimiters the first.
    """
    sure = [(-float(top[i]), int(at)) for i, at in enumerate(positions) if int(best[i]) in delimiters]
    if not sure or -min(sure)[0] < choice["threshold"]:
        return default
    return min(sure)[1] + 1

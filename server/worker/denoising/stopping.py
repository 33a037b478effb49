"""When a text ends before each of its masks was chosen by itself. Pure functions of a block's statistics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.types import Choice

Floats = NDArray[np.float32]


def eotp(
    fixed: Mapping[int, int],
    masked: Sequence[int],
    best: NDArray[np.int64],
    top: Floats,
    stop_ids: Collection[int],
) -> int | None:
    """Where the text ends: behind the first fixed stop token, else behind the surest mask that predicts one.

    fixed   {position: token} of the block's output as this step leaves it
    masked  positions of the masks left, with their likeliest tokens and probabilities
    Returns the end as a sequence position, None = nowhere in this block
    Source: Bao et al., Learn2PD (2025), end-of-text prediction. It ends the text at a token that is only predicted: a
    sure mistake early in the block cuts the answer off.
    """
    stops = [position for position, token in fixed.items() if token in stop_ids]
    if stops:
        return min(stops) + 1
    likely = [(float(top[i]), -position) for i, position in enumerate(masked) if int(best[i]) in stop_ids]
    return 1 - max(likely)[1] if likely else None


def all_in(gap: Floats, progress: float, choice: Choice) -> bool:
    """Whether all masks of the block are filled now: the mean logit gap of the likeliest to the second is large enough.

    Source: Li et al., "Diffusion Language Models Know the Answer Before Decoding" (Prophet, 2025). Departure: the mean
    is over all masks of the block; the paper's answer region is known for benchmarks only.
    """
    third = "early" if progress < 1 / 3 else "middle" if progress < 2 / 3 else "late"
    return gap.size > 0 and float(np.mean(gap, dtype=np.float64)) > choice[third]

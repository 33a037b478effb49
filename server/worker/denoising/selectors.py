"""Which masks of the window are fixed in a step: one pure function per method of `scheduler.policies.SELECTORS`.

A selector sees the masks that may be fixed, in the order of their positions, and says yes or no to each. It says yes to
at least one, so a block ends. What each takes from its paper and where it departs is in its docstring and in README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.types import Choice

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


class Masks(NamedTuple):
    """The masks that may be fixed, at least one, ascending; a number each.

    confidence  probability of the token drawn; minus infinity where it may only come last
    margin      probability of the likeliest less that of the second; minus infinity likewise
    entropy     in nats; plus infinity likewise
    quota       fewest to fix, for the selectors that have a quota
    threshold   in place of the method's own
    uniform     a number in (0, 1) for each, of the request's own noise
    verdicts    Learn2PD's filter, in (0, 1)
    """

    positions: NDArray[np.int64]
    confidence: Floats
    margin: Floats
    entropy: Floats
    quota: int
    threshold: float | None
    uniform: Callable[[], NDArray[np.float64]]
    verdicts: Floats | None = None


Selector = Callable[[Masks, Choice], Bools]


def _best(scores: NDArray[np.floating], count: int) -> Bools:
    """The `count` highest; of equal ones the leftmost."""
    chosen = np.zeros(scores.size, dtype=np.bool_)
    chosen[np.argsort(-scores, kind="stable")[: max(1, count)]] = True
    return chosen


def _above(scores: Floats, masks: Masks, choice: Choice) -> Bools:
    threshold = choice["threshold"] if masks.threshold is None else masks.threshold
    return scores >= threshold


def sequential(masks: Masks, choice: Choice) -> Bools:
    """The leftmost `quota`. SDAR's "sequential"; with one a step what a grammar can follow."""
    return _best(np.where(np.isneginf(masks.confidence), -np.inf, -masks.positions.astype(np.float64)), masks.quota)


def low_confidence(masks: Masks, choice: Choice) -> Bools:
    """The `quota` surest. Nie et al., "Large Language Diffusion Models" (LLaDA, 2025), algorithm 5; SDAR's "static"."""
    return _best(masks.confidence, masks.quota)


def random(masks: Masks, choice: Choice) -> Bools:
    """Any `quota`. LLaDA's "random": what may only come last does so here, too."""
    return _best(np.where(np.isneginf(masks.confidence), -np.inf, masks.uniform()), masks.quota)


def origin(masks: Masks, choice: Choice) -> Bools:
    """Each mask by itself with probability quota / masks. Ye et al., "Dream 7B" (2025), the sampler's "origin".

    On Dream's linear schedule 1 - t'/t is one over the steps left, which is what quota / masks comes to. Departures:
    the number of masks is the sequence's own, not the batch's mean; where none is drawn, the nearest is fixed.
    """
    uniform = np.where(np.isneginf(masks.confidence), 1.0, masks.uniform())
    drawn = uniform < min(1.0, masks.quota / uniform.size)
    return drawn if drawn.any() else _best(-uniform, 1)


def maskgit_plus(masks: Masks, choice: Choice) -> Bools:
    """The `quota` surest, or as many drawn by softmax(confidence / alg_temp). Dream's "maskgit_plus"."""
    return _drawn(masks.confidence, masks, choice)


def topk_margin(masks: Masks, choice: Choice) -> Bools:
    """The same by p1 - p2. Dream's "topk_margin"; Kim et al., "Train for the Worst, Plan for the Best" (2025), 4.1."""
    return _drawn(masks.margin, masks, choice)


def entropy(masks: Masks, choice: Choice) -> Bools:
    """The same by least entropy. Dream's "entropy"."""
    return _drawn(-masks.entropy, masks, choice)


def _drawn(scores: Floats, masks: Masks, choice: Choice) -> Bools:
    """`quota` without replacement with probabilities softmax(score / alg_temp): the best after Gumbel noise (Vieira,
    2014), which is the law of the sampler's multinomial draw.
    """
    if choice["alg_temp"] == 0:
        return _best(scores, masks.quota)
    noisy = scores.astype(np.float64) / choice["alg_temp"] - np.log(-np.log(masks.uniform()))
    return _best(noisy, masks.quota)


def threshold(masks: Masks, choice: Choice) -> Bools:
    """All with confidence >= threshold, and the surest. Wu et al., "Fast-dLLM" (2025), algorithm 1; LLaDA2.0.

    Departure: LLaDA2.0 and Fast-dLLM v2 compare with >; here a threshold above 1 is what fixes one a step.
    """
    return _above(masks.confidence, masks, choice) | _best(masks.confidence, 1)


def factor(masks: Masks, choice: Choice) -> Bools:
    """The n surest, n the largest with (n + 1)(1 - c_n) < factor, at least one. Fast-dLLM, theorem 1 and algorithm 1.

    The paper's rule; the published loop adds one when it stops at either end.
    """
    order = np.sort(masks.confidence)[::-1].astype(np.float64)
    is_within = (np.arange(order.size) + 2) * (1 - order) < choice["factor"]
    return _best(masks.confidence, int(np.flatnonzero(is_within).max(initial=0)) + 1)


def localleap(masks: Masks, choice: Choice) -> Bools:
    """Anchors with confidence >= threshold, their neighbours within `radius` with >= relaxed, and the surest.

    Kong et al., "Accelerating Diffusion LLM Inference via Local Determinism Propagation" (LocalLeap, 2025).
    """
    anchors = _above(masks.confidence, masks, choice)
    distance = np.abs(masks.positions[:, None] - masks.positions[None, anchors])
    is_near = distance.min(axis=1, initial=np.iinfo(np.int64).max) <= choice["radius"]
    return np.asarray(anchors | (is_near & (masks.confidence >= choice["relaxed"])) | _best(masks.confidence, 1))


def entropy_threshold(masks: Masks, choice: Choice) -> Bools:
    """All with entropy <= `entropy`, and the least uncertain. Chen et al., "dParallel" (2025), inference."""
    chosen: Bools = (masks.entropy <= choice["entropy"]) | _best(-masks.entropy, 1)
    return chosen


def entropy_bounded(masks: Masks, choice: Choice) -> Bools:
    """The least uncertain masks while the sum of their entropies stays below gamma, at least one.

    Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking" (2025), as SDAR
    has it: the paper leaves the largest entropy out of the sum.
    """
    total = np.sort(masks.entropy).astype(np.float64).cumsum()
    return _best(-masks.entropy, int((total < choice["gamma"]).sum()))


def dynamic(masks: Masks, choice: Choice) -> Bools:
    """All with confidence >= threshold if these are at least `quota`, else the `quota` surest. SDAR's "dynamic"."""
    sure = _above(masks.confidence, masks, choice)
    return sure if sure.sum() >= masks.quota else _best(masks.confidence, masks.quota)


def hierarchy(masks: Masks, choice: Choice) -> Bools:
    """The best of every run of neighbouring masks if its confidence is >= low, all with >= threshold, and the surest.

    Ma et al., "dInfer" (2025), hierarchical decoding: neighbours depend on each other most. A run is of masks of the
    window.
    """
    chosen = threshold(masks, choice)
    starts = np.flatnonzero(np.diff(masks.positions, prepend=masks.positions[0] - 2) != 1)
    for start, end in zip(starts, [*starts[1:], masks.positions.size], strict=True):
        best = start + int(np.argmax(masks.confidence[start:end]))
        chosen[best] |= masks.confidence[best] >= choice["low"]
    return chosen


def wide_in(masks: Masks, choice: Choice) -> Bools:
    """All with confidence > wide, but no more than 0.7 of the masks (from 5 to 20), and the surest.

    Hong et al., "Wide-In, Narrow-Out" (WINO, 2025), and its published bounds.
    """
    most = min(max(int(0.7 * masks.positions.size), 5), 20)
    return _best(masks.confidence, min(most, int((masks.confidence > choice["wide"]).sum())))


def learn2pd(masks: Masks, choice: Choice) -> Bools:
    """All that the filter lets pass, and the `quota` surest. Bao et al., "Learning to Parallel" (Learn2PD, 2025)."""
    assert masks.verdicts is not None, "the reader has asked the filter"
    passed = _above(masks.verdicts, masks, choice) & ~np.isneginf(masks.confidence)
    return passed | _best(masks.confidence, masks.quota)


BY_NAME: Mapping[str, Selector] = {
    "auto": threshold,
    "sequential": sequential,
    "low_confidence": low_confidence,
    "random": random,
    "origin": origin,
    "maskgit_plus": maskgit_plus,
    "topk_margin": topk_margin,
    "entropy": entropy,
    "threshold": threshold,
    "factor": factor,
    "localleap": localleap,
    "entropy_threshold": entropy_threshold,
    "entropy_bounded": entropy_bounded,
    "dynamic": dynamic,
    "hierarchy": hierarchy,
    "edit": threshold,
    "wino": wide_in,
    "learn2pd": learn2pd,
}
"""Which function chooses; what `edit` and `wino` do to fixed tokens is in editing.py."""

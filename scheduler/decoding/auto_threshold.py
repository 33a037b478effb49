"""`auto`'s controller: the confidence from which a mask is fixed, led by what lower ones would have come to.

After a step the worker says what it would have put where masks are left (guesses). One step later, with more of the
block known, each of them has been fixed, or is guessed again: the same token means that fixing it a step earlier would
have changed nothing. Guesses just below the threshold are such trials for a lower one. Agreement lowers the threshold
by `_FALL`, a miss raises it by `_RISE`: it settles where about one trial in twenty is a miss.

Pure and deterministic: a function of the request's own past, carried from block to block, so that the crowd changes no
text. A resubmitted request is denoised again from its first block, and so led to the same place. It is ours, with no
paper behind it; the trial is that of Prophet and dParallel (a token's argmax is mostly right long before its mask is
fixed), the two steps are those of additive-increase control.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy

from scheduler.types import Choice, Span

_FALL = 0.01
_RISE = 19 * _FALL
_BAND = 0.15
"""How far below the threshold a guess still says something about a slightly lower one."""

Guesses = Iterable[tuple[int, int, float]]
"""(position, token, confidence) of masks that are left."""


class AutoThreshold:
    """The threshold of one request.

    selector   with `threshold` (where it starts, and its upper end) and `lowest` (its lower end)
    """

    __slots__ = ("_guesses", "_highest", "_lowest", "value")

    def __init__(self, selector: Choice) -> None:
        self._highest = selector["threshold"]
        self._lowest = min(selector["lowest"], self._highest)
        self.value = self._highest
        self._guesses: dict[int, tuple[int, float]] = {}

    def copy(self) -> AutoThreshold:
        twin = copy(self)
        twin._guesses = dict(self._guesses)
        return twin

    def learn(self, fixed: Mapping[int, int], guesses: Guesses) -> None:
        """Take in a step: the tokens it fixed by position, and its guesses of the masks that are left."""
        after = {position: (token, confidence) for position, token, confidence in guesses}
        least = self.value - _BAND
        for position, (token, confidence) in self._guesses.items():
            now = fixed[position] if position in fixed else after.get(position, (None,))[0]
            if confidence < least or now is None:
                continue
            self.value += -_FALL if now == token else _RISE
        self.value = min(self._highest, max(self._lowest, self.value))
        self._guesses = after

    def forget_guesses(self) -> None:
        """The block is over, or its masks are set anew: guesses of it say nothing about what follows."""
        self._guesses = {}


def under_load(span: Span, selector: Choice, fullness: float) -> Span:
    """The span with a threshold that is lower in a full step, where the request allows that: its text then depends on
    the load. `fullness`, in [0, 1]: the share of the denoise rows asked for that the step has no room for.
    """
    denoise = span.denoise
    if denoise is None or denoise.threshold is None or not selector["load"] or not fullness:
        return span
    return span._replace(denoise=denoise._replace(threshold=denoise.threshold - selector["load"] * fullness))

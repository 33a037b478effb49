"""Which rows of a canvas a bidirectional model computes in a step: one rule for each cache of `policies.CACHES`.

Integers only. A row that is computed writes its keys into the sequence's pages; the others are read there as earlier
steps left them, so every rule but `none` approximates. A rule names rows; `plan_rows` adds those that the step judges.
Sources and departures: `server/worker/denoising/README.md`; diffusion reference, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import NamedTuple

from scheduler.types import Choice


class View(NamedTuple):
    """What a rule looks at, as a step begins. Positions are the sequence's; lists of them ascend.

    size        rows of the canvas, prompt included: 0 to size - 1
    lo, hi      the block; the whole canvas behind the prompt where the planner knows no blocks
    block_size  tokens of a block as asked for
    window      positions [first, end) that may be fixed
    step        steps that the block has had
    masks       all masks
    fresh       what the last step changed
    due         what this step will fix, where that is known beforehand (selector `random`)
    shift       0: row i answers for position i; 1: for position i + 1
    """

    size: int
    lo: int
    hi: int
    block_size: int
    window: tuple[int, int]
    step: int
    masks: Sequence[int]
    fresh: Sequence[int] = ()
    due: Sequence[int] = ()
    shift: int = 0


@dataclass(slots=True)
class CacheState:
    """What a cache knows of earlier steps.

    is_warm    a step has computed all rows since the sequence got its pages
    num_fixed  tokens fixed since (and in) the last step that computed all rows
    is_stale   the worker saw keys drift: all rows are due (elastic)
    tracked    rows whose attention tells of drift (elastic)
    """

    is_warm: bool = False
    num_fixed: int = 0
    is_stale: bool = False
    tracked: tuple[int, ...] = ()

    def absorb(self, is_refresh: bool, num_fixed: int, is_stale: bool, tracked: tuple[int, ...]) -> None:
        """Learn what a step did. is_refresh: it computed all rows."""
        self.is_warm = self.is_warm or is_refresh
        self.num_fixed = num_fixed if is_refresh else self.num_fixed + num_fixed
        self.is_stale, self.tracked = is_stale, tracked

    def restart(self) -> None:
        """The pages are gone."""
        self.is_warm, self.num_fixed, self.is_stale, self.tracked = False, 0, False, ()


Rule = Callable[[Choice, View, CacheState], Iterable[int] | None]
"""The rows that a step computes; None = all."""


def plan_rows(cache: Choice, view: View, state: CacheState) -> set[int] | None:
    """Rows of the next step inside [0, size), or None for all: a first step, a refresh, or a cache that asks for all.

    Rows that answer for judged positions are the caller's to add.
    """
    if not state.is_warm:
        return None
    rows = RULES[cache.name](cache, view, state)
    if rows is None:
        return None
    chosen = {row for row in rows if 0 <= row < view.size}
    return None if len(chosen) == view.size else chosen


def _none(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    return None


def _prefix(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    """The block and everything behind it."""
    return None if view.step == 0 else range(view.lo, view.size)


def _dual(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    """The block alone."""
    return None if view.step == 0 else range(view.lo, view.hi)


def _vicinity(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    """The block and its neighbourhood, after a few steps that compute all rows."""
    margin = int(cache["margin"])
    return None if view.step < max(1, cache["warm_up"]) else range(view.lo - margin, view.hi + margin)


def _dsb(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    """The window and rows before it, just-fixed ones in any case; all rows each time a block's worth was fixed."""
    if state.num_fixed >= view.block_size:
        return None
    first, end = view.window
    first -= int(cache["prefix"])
    return range(min(first, view.fresh[0]) if view.fresh else first, end)


def _dkv_decode(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    """Masks, and tokens the step after they were fixed: then their keys are computed with the token, and stay.

    With a shift the row before a mask answers for it, so it is not at rest either.
    """
    if view.step < 2 or view.step % int(cache["refresh"]) == 0:
        return None
    return {*view.masks, *view.fresh, *(mask - view.shift for mask in view.masks)}


def _dkv_greedy(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    """What was fixed, what will be, and the rows nearest to these: masks first, then others."""
    if view.step % int(cache["refresh"]) == 0:
        return None
    centres = sorted({*view.fresh, *view.due})
    return {*centres, *_nearest(centres, view, int(cache["window"]))}


def _nearest(centres: Sequence[int], view: View, count: int) -> list[int]:
    masks = set(view.masks)

    def distance(row: int) -> tuple[bool, int, int]:
        return row not in masks, min((abs(row - centre) for centre in centres), default=0), row

    return nsmallest(count, set(range(view.size)).difference(centres), key=distance)


def _elastic(cache: Choice, view: View, state: CacheState) -> Iterable[int] | None:
    """Tracked rows, what was fixed, and the first masks; all rows after attention has drifted."""
    if state.is_stale:
        return None
    return {*state.tracked, *view.fresh, *view.masks[: int(cache["width"])]}


RULES: Mapping[str, Rule] = {
    "none": _none,
    "prefix": _prefix,
    "dual": _dual,
    "vicinity": _vicinity,
    "dsb": _dsb,
    "dkv_decode": _dkv_decode,
    "dkv_greedy": _dkv_greedy,
    "elastic": _elastic,
}

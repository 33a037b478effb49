"""Rows whose keys lie in several units, and where they come from: shared prefixes (the cascade) and fixed cuts.

A unit with a part writes its results to scratch beside their log-sum-exp; a list says which parts each row has. Both
are data of the plan: the kernels know neither prefixes nor cuts. Source: partial softmax states merge in any order, as
in Ye et al., "FlashInfer" (2025), 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.triton.plan import WHOLE, Ints, Launch, Prefix

_ALIGN = 64
"""Prefixes end at multiples of every tile's keys."""
CUT_BYTES = 64 << 10
"""What one more piece costs, in bytes of KV that could have been read instead (`attention.md` 2.11)."""


@dataclass(frozen=True)
class Parts:
    """The rows that several units hold a part of.

    rows    int32 [R]
    starts  int32 [R + 1], where each row's entries begin
    places  int32 [E, 2], in the order of their keys: scratch row of the row's first head in the part, and the scratch
            rows of one kv head there
    num_places  scratch rows in all
    """

    rows: Ints
    starts: Ints
    places: Ints
    num_places: int


def number_parts(
    launches: Sequence[Launch], group: int, num_kv: int, first_place: int
) -> tuple[list[Launch], Parts | None]:
    """Give each unit with a part its place in the scratch, from first_place on; None if no unit has one."""
    numbered, columns, place = [], [], first_place
    for launch in launches:
        units = launch.units
        chosen = np.flatnonzero(units[:, 7] != WHOLE)
        if len(chosen):
            units = units.copy()
            sizes = units[chosen, 2] * (group * num_kv)
            units[chosen, 7] = place + np.cumsum(sizes) - sizes
            place += int(sizes.sum())
            columns.append(_entries(units[chosen], launch.row_list, group))
        numbered.append(replace(launch, units=units))
    if not columns:
        return numbered, None
    row, lo, at, stride = np.concatenate(columns, axis=1)
    order = np.lexsort((lo, row))
    rows, first = np.unique(row[order], return_index=True)
    starts = np.append(first, len(row)).astype(np.int32)
    places = np.stack((at[order], stride[order]), axis=1).astype(np.int32)
    return numbered, Parts(rows.astype(np.int32), starts, places, place - first_place)


def _entries(units: Ints, row_list: Ints | None, group: int) -> NDArray[np.int64]:
    """(row, first key, place of the row's first head, places of a kv head) of every row of every unit, [4, E]."""
    count = units[:, 2]
    unit = np.repeat(np.arange(len(units)), count)
    index = np.arange(len(unit)) - (np.cumsum(count) - count)[unit]
    row = units[unit, 1] + index
    if row_list is not None:
        row = row_list[row]
    return np.stack((row, units[unit, 3], units[unit, 7] + index * group, count[unit] * group)).astype(np.int64)


def shared_prefixes(
    spans: NDArray[np.int64], tables: Ints, limits: Ints, page_size: int, pays: Callable[[int, int], bool]
) -> list[Prefix]:
    """The stretches of keys that it pays to read once for several spans: a walk down the tree of their pages.

    spans   index of each span in the step
    tables  int32 [spans, pages], what each span's pages are
    limits  keys that all rows of each span see
    pays    whether reading this many keys once for that many spans does
    """
    found: list[Prefix] = []
    num_pages = limits // page_size
    # (spans that are alike so far, page from which they may differ, keys already in a prefix of theirs)
    left = [(np.arange(len(spans)), 0, 0)]
    while left:
        members, page, done = left.pop()
        members = members[num_pages[members] > page]
        if len(members) < 2:
            continue
        members = members[np.argsort(tables[members, page], kind="stable")]
        for group in np.split(members, np.flatnonzero(np.diff(tables[members, page])) + 1):
            if len(group) < 2:
                continue
            most = int(num_pages[group].min())
            alike = (tables[group, page:most] == tables[group[0], page:most]).all(axis=0)
            end = most if alike.all() else page + int(np.argmin(alike))
            hi = end * page_size // _ALIGN * _ALIGN
            if hi > done and pays(hi - done, len(group)):
                found.append(Prefix(spans[group], done, hi))
                left.append((group, end, hi))
            else:
                left.append((group, end, done))
    return found

"""Balanced work for one step's attention, planned on the host: units of query rows, and one flat space of key tiles.

A *unit* is up to tile_rows // group rows of one span. The key tiles of all units of all kv heads are laid end to end,
cut into equal pieces, one per program, wherever the cuts fall; a unit that was cut is merged by a second kernel. So no
sequence, however long, and no batch size decides whether work is split, and scratch is two slots per program whatever
the batch. Nothing here depends on the number of heads but the total. The same plan serves every layer of one window.

Source: Osama et al., "Stream-K" (2023), in closed form; shape of a unit as in `attention.md` 2.3.
numpy only: 40 calls whatever the step (figures in kernels/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.ops import StepRows as StepRows
from kernels.triton.tiles import SMALL_ROWS, Geometry, large_geometry, small_geometry

Ints = NDArray[np.int32]
UNIT_FIELDS = 8
WHOLE = -1
"""`part` of a unit whose rows no other unit has."""
CUT_KEYS = 2048
LARGE_CUT_KEYS = 1 << 15
"""Where fixed cuts fall: multiples of these in the KV index. Long spans have units enough, and their parts take memory:
rows x query heads x head size x 4 bytes for each cut."""
NO_TREE = 1 << 30
"""Where the tree of a row without one starts: past every key. 0 would mask the row (`attention.md` 7, mistake 17)."""


@dataclass(frozen=True)
class RowMasks:
    """Which keys each row sees, int32 [T]: [low, visible) before its tree, from tree_start on the bits of its mask.

    low is None without a window; tree (int32 [T, 2], low word first) and tree_start without trees. `visible` is one
    past the last key that a row sees, of trees too. Under a window the first `sinks` keys are seen too.
    """

    visible: Ints
    low: Ints | None
    tree: Ints | None
    tree_start: Ints | None
    sinks: int = 0


@dataclass(frozen=True)
class Prefix:
    """Keys [lo, hi) that all rows of some spans see and whose pages these share; both multiples of every tile."""

    spans: NDArray[np.int64]
    lo: int
    hi: int


@dataclass(frozen=True)
class Launch:
    """The units of one geometry, longest first, and how their tiles are shared out.

    units   int32 [U, 8]: page table row, first row, number of rows, first key, [inner_lo, inner_hi) that every row sees
            (in whole tiles), one past the last key, part. The first tile starts at first key // tile_keys * tile_keys;
            before it come the tiles of the sinks, unless it is one of them.
            part: WHOLE, or where in the scratch the unit's results go, since its rows have other parts (`parts.py`)
    cum     int32 [U + 1]: tiles of the units before each; cum[-1] = tiles of one kv head
    budget  tiles of each program's piece; total = cum[-1] * kv heads
    row_list  int32, what units' rows are indices into; None: rows of the step
    is_whole  no unit is cut by the balance: a program takes those whose first tile its share holds
    """

    geometry: Geometry
    units: Ints
    cum: Ints
    budget: int
    total: int
    row_list: Ints | None = None
    is_whole: bool = False

    @property
    def num_pieces(self) -> int:
        return -(-self.total // self.budget)

    def shared_among(self, num_programs: int) -> Launch:
        """The same units for another number of programs."""
        budget = max(self.geometry.min_tiles, -(-self.total // num_programs))
        return replace(self, geometry=replace(self.geometry, num_programs=num_programs), budget=budget)

    def header(self) -> Ints:
        return np.array([self.budget, self.cum[-1], self.total, len(self.units), self.is_whole], dtype=np.int32)


def row_masks(rows: StepRows, window: int | None, sinks: int = 0) -> RowMasks:
    """Intervals and tree masks of the rows of one step under a sliding window (itself included) or none."""
    visible, low, tree, start = rows.visible, None, None, None
    if window is not None:
        low = np.maximum(rows.positions - (window - 1), 0).astype(np.int32, copy=False)
    if rows.tree is not None and rows.tree_starts is not None:
        masks = rows.tree.view(np.uint64)
        if window is not None and window < 64:
            masks = _last_bits(masks, window)
        tree = np.ascontiguousarray(masks).view(np.int32).reshape(-1, 2)
        is_tree = rows.tree != 0
        start = np.where(is_tree, rows.tree_starts, NO_TREE).astype(np.int32, copy=False)
        visible = np.where(is_tree, rows.tree_starts + _bit_length(masks), visible).astype(np.int32, copy=False)
    return RowMasks(visible, low, tree, start, 0 if window is None else sinks)


def _bit_length(masks: NDArray[np.uint64]) -> Ints:
    # Words of 32 bits are exact as floats; 64 would round up to the next power of two.
    low, high = (
        np.frexp((masks >> shift & 0xFFFFFFFF).astype(np.float64))[1] for shift in (np.uint64(0), np.uint64(32))
    )
    return np.where(high > 0, high + 32, low).astype(np.int32)


def _last_bits(masks: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The highest `count` set bits of each mask."""
    bits = np.unpackbits(masks[:, None].view(np.uint8), axis=1, bitorder="little")
    at_or_above = bits[:, ::-1].cumsum(axis=1, dtype=np.uint8)[:, ::-1]
    kept: NDArray[np.uint64] = np.packbits(bits & (at_or_above <= count), axis=1, bitorder="little").view(np.uint64)[
        :, 0
    ]
    return kept


def plan_step(
    rows: StepRows,
    masks: RowMasks,
    group: int,
    num_kv: int,
    head_dim: int,
    itemsize: int,
    num_sms: int,
    prefixes: Sequence[Prefix] = (),
    deterministic: bool = False,
) -> list[Launch]:
    """The launches of one step: short spans in small tiles, long ones in large tiles, shared prefixes in a third.

    None if there are no rows. prefixes are of short spans (`is_short`).
    deterministic  cuts fall at fixed keys and tiles depend on the span alone, not on the spans beside it
    """
    lengths = np.diff(rows.span_starts)
    small = is_short(lengths, group)
    floors: Ints | None = None
    if prefixes:
        floors = np.zeros(len(lengths), dtype=np.int32)
        for prefix in prefixes:
            floors[prefix.spans] = np.maximum(floors[prefix.spans], prefix.hi)

    def small_of(packed_rows: int) -> Geometry:
        return small_geometry(SMALL_ROWS if deterministic else packed_rows, group, head_dim, itemsize, num_sms)

    def large_of(_: int) -> Geometry:
        return large_geometry(group, head_dim, itemsize, num_sms)

    launches = []
    shapes: list[tuple[NDArray[np.bool_], Callable[[int], Geometry], int]] = [
        (small, small_of, CUT_KEYS),
        (~small, large_of, LARGE_CUT_KEYS),
    ]
    for chosen, geometry_of, cut in shapes:
        chosen &= lengths > 0
        if chosen.any():
            packed = int(lengths[chosen].max()) * group
            launches.append(
                plan_launch(
                    rows.row_seq, rows.span_starts[:-1][chosen], lengths[chosen], masks, group, num_kv,
                    geometry_of(packed), None if floors is None else floors[chosen], cut if deterministic else None,
                )
            )  # fmt: skip
    if prefixes:
        packed = max(int(lengths[prefix.spans].sum()) for prefix in prefixes) * group
        geometry = small_of(packed) if packed <= max(SMALL_ROWS, group) else large_of(packed)
        launches.append(_plan_prefixes(rows, prefixes, group, num_kv, geometry))
    return launches


def is_short(lengths: Ints, group: int) -> NDArray[np.bool_]:
    """Which spans of so many rows go to the small tiles, the others to the large ones."""
    short: NDArray[np.bool_] = lengths * group <= max(SMALL_ROWS, group)
    return short


def plan_launch(
    row_seq: Ints,
    starts: Ints,
    lengths: Ints,
    masks: RowMasks,
    group: int,
    num_kv: int,
    geometry: Geometry,
    floors: Ints | None = None,
    cut: int | None = None,
) -> Launch:
    """Units of the spans [start, start + length) of rows, none empty, and equal pieces of their tiles.

    floors  keys before which each span's rows are parts of other units; a multiple of the tiles, 0 = none
    cut     fixed cuts: units end at multiples of it (of a window, which is short, nowhere) and are not cut otherwise
    """
    keys, per_unit = geometry.tile_keys, geometry.tile_rows // group
    span: NDArray[np.int64] | slice = slice(None)
    if int(lengths.max()) <= per_unit:
        first, count = starts, lengths
    else:
        num_units = -(-lengths // per_unit)
        span = np.repeat(np.arange(len(lengths)), num_units)
        index = np.arange(int(num_units.sum())) - (np.cumsum(num_units) - num_units)[span]
        first = starts[span] + index * per_unit
        count = np.minimum(per_unit, starts[span] + lengths[span] - first)
    rows = _rows_of(starts, lengths)
    # Rows of the chosen spans, side by side: a unit is a segment of them.
    segment = np.cumsum(count) - count
    visible = masks.visible[rows]
    plain = visible if masks.tree_start is None else np.minimum(visible, masks.tree_start[rows])
    hi = np.maximum.reduceat(visible, segment)
    inner_hi = np.minimum.reduceat(plain, segment) // keys * keys
    num_extra: Ints | int = 0
    if masks.low is None:
        lo = np.zeros_like(hi) if floors is None else floors[span]
        base = inner_lo = lo
    else:
        low = masks.low[rows]
        lo = np.minimum(np.minimum.reduceat(low, segment), hi)
        if masks.sinks:
            sink_tiles = -(-masks.sinks // keys)
            num_extra = np.where(lo >= sink_tiles * keys, sink_tiles, 0)
            lo = np.where(num_extra > 0, lo, 0)
        base = lo // keys * keys
        inner_lo = -(-np.maximum.reduceat(low, segment) // keys) * keys
        if cut is not None:  # tiles in the order of their keys, whatever the span's other rows see
            inner_hi = base
    has_inner = inner_hi > inner_lo
    inner_lo, inner_hi = np.where(has_inner, inner_lo, base), np.where(has_inner, inner_hi, base)
    tiles = np.maximum(1, num_extra - (base - hi) // keys)
    units = np.empty((len(hi), UNIT_FIELDS), dtype=np.int32)
    part = WHOLE if floors is None else np.where(floors[span] > 0, 0, WHOLE)
    for field, column in enumerate((row_seq[first], first, count, lo, inner_lo, inner_hi, hi, part)):
        units[:, field] = column
    if cut is not None and masks.low is None:
        units = _cut(units, cut)
        tiles = np.maximum(1, -((units[:, 3] - units[:, 6]) // keys))
    return _launch(units, tiles, num_kv, geometry, is_whole=cut is not None)


def _cut(units: Ints, cut: int) -> Ints:
    """Each unit once for every stretch of keys between multiples of `cut` that it reaches into."""
    lo, hi = units[:, 3], units[:, 6]
    first = lo // cut
    count = np.maximum(1, -(-hi // cut) - first)
    source = np.repeat(np.arange(len(units)), count)
    index = np.arange(len(source)) + (first - np.cumsum(count) + count)[source]
    pieces = units[source]
    pieces[:, 3] = np.maximum(pieces[:, 3], index * cut)
    pieces[:, 6] = np.minimum(pieces[:, 6], (index + 1) * cut)
    pieces[:, 7] = np.where(count[source] > 1, 0, WHOLE)
    return pieces


def _plan_prefixes(rows: StepRows, prefixes: Sequence[Prefix], group: int, num_kv: int, geometry: Geometry) -> Launch:
    """Units over shared prefixes, each with rows of many spans."""
    lengths, starts = np.diff(rows.span_starts), rows.span_starts[:-1]
    per_unit, listed, units, num_listed = geometry.tile_rows // group, [], [], 0
    for prefix in prefixes:
        members = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in prefix.spans])
        for at in range(0, len(members), per_unit):
            count = min(per_unit, len(members) - at)
            keys = (prefix.lo, prefix.lo, prefix.hi, prefix.hi)
            units.append((int(rows.row_seq[members[0]]), num_listed + at, count, *keys, 0))
        listed.append(members)
        num_listed += len(members)
    table = np.array(units, dtype=np.int32)
    tiles = (table[:, 6] - table[:, 3]) // geometry.tile_keys
    return _launch(table, tiles, num_kv, geometry, np.concatenate(listed).astype(np.int32))


def _launch(
    units: Ints, tiles: Ints, num_kv: int, geometry: Geometry, row_list: Ints | None = None, is_whole: bool = False
) -> Launch:
    """The units longest first, and how their tiles are shared out."""
    order = np.argsort(-tiles, kind="stable")
    cum = np.zeros(len(units) + 1, dtype=np.int32)
    np.cumsum(tiles[order], out=cum[1:])
    total = int(cum[-1]) * num_kv
    budget = max(geometry.min_tiles, -(-total // geometry.num_programs))
    return Launch(geometry, units[order], cum, budget, total, row_list, is_whole)


def _rows_of(starts: Ints, lengths: Ints) -> NDArray[np.int64] | slice:
    """Indices of the rows of some spans, one after the other; a slice where they already are."""
    total = int(lengths.sum())
    if int(starts[-1] + lengths[-1] - starts[0]) == total:
        return slice(int(starts[0]), int(starts[0]) + total)
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(total)

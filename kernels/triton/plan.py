"""Balanced work for one step's attention, planned on the host: units of query rows, and one flat space of key tiles.

A *unit* is up to tile_rows // group rows of one span. The key tiles of all units of all kv heads are laid end to end,
cut into equal pieces, one per program, wherever the cuts fall; a unit that was cut is merged by a second kernel. So no
sequence, however long, and no batch size decides whether work is split, and scratch is two slots per program whatever
the batch. Nothing here depends on the number of heads but the total. The same plan serves every layer of one window.

Source: Osama et al., "Stream-K" (2023), in closed form; shape of a unit as in `attention.md` 2.3.
numpy only: 40 calls whatever the step (figures in kernels/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.ops import StepRows as StepRows
from kernels.triton.tiles import SMALL_ROWS, Geometry, large_geometry, small_geometry

Ints = NDArray[np.int32]
UNIT_FIELDS = 8
NO_TREE = 1 << 30
"""Where the tree of a row without one starts: past every key. 0 would mask the row (`attention.md` 7, mistake 17)."""


@dataclass(frozen=True)
class RowMasks:
    """Which keys each row sees, int32 [T]: [low, visible) before its tree, from tree_start on the bits of its mask.

    low is None without a window; tree (int32 [T, 2], low word first) and tree_start without trees. `visible` is one
    past the last key that a row sees, of trees too.
    """

    visible: Ints
    low: Ints | None
    tree: Ints | None
    tree_start: Ints | None


@dataclass(frozen=True)
class Launch:
    """The units of one geometry, longest first, and how their tiles are shared out.

    units   int32 [U, 8]: page table row, first row, number of rows, first key, [inner_lo, inner_hi) that every row sees
            (in whole tiles), one past the last key, 0. The first tile starts at first key // tile_keys * tile_keys
    cum     int32 [U + 1]: tiles of the units before each; cum[-1] = tiles of one kv head
    budget  tiles of each program's piece; total = cum[-1] * kv heads
    """

    geometry: Geometry
    units: Ints
    cum: Ints
    budget: int
    total: int

    @property
    def num_pieces(self) -> int:
        return -(-self.total // self.budget)

    def shared_among(self, num_programs: int) -> Launch:
        """The same units for another number of programs."""
        budget = max(self.geometry.min_tiles, -(-self.total // num_programs))
        return replace(self, geometry=replace(self.geometry, num_programs=num_programs), budget=budget)

    def header(self) -> Ints:
        return np.array([self.budget, self.cum[-1], self.total, len(self.units)], dtype=np.int32)


def row_masks(rows: StepRows, window: int | None) -> RowMasks:
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
    return RowMasks(visible, low, tree, start)


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
    rows: StepRows, masks: RowMasks, group: int, num_kv: int, head_dim: int, itemsize: int, num_sms: int
) -> list[Launch]:
    """The launches of one step: short spans in small tiles, long ones in large tiles; at most two, none if no rows."""
    lengths = np.diff(rows.span_starts)
    packed = lengths * group
    is_large = is_long(lengths, group)
    launches = []
    shapes = [
        (~is_large, lambda most: small_geometry(most, group, head_dim, itemsize, num_sms)),
        (is_large, lambda _: large_geometry(group, head_dim, itemsize, num_sms)),
    ]
    for chosen, geometry_of in shapes:
        chosen &= lengths > 0
        if chosen.any():
            geometry = geometry_of(int(packed[chosen].max()))
            starts = rows.span_starts[:-1][chosen]
            launches.append(plan_launch(rows.row_seq, starts, lengths[chosen], masks, group, num_kv, geometry))
    return launches


def is_long(lengths: Ints, group: int) -> NDArray[np.bool_]:
    """Which spans of so many rows go to the large tiles."""
    return lengths * group > max(SMALL_ROWS, group)


def plan_launch(
    row_seq: Ints, starts: Ints, lengths: Ints, masks: RowMasks, group: int, num_kv: int, geometry: Geometry
) -> Launch:
    """Units of the spans [start, start + length) of rows, none empty, and equal pieces of their tiles."""
    keys, per_unit = geometry.tile_keys, geometry.tile_rows // group
    num_units = -(-lengths // per_unit)
    span = np.repeat(np.arange(len(lengths)), num_units)
    index = np.arange(len(span)) - (np.cumsum(num_units) - num_units)[span]
    first = starts[span] + index * per_unit
    count = np.minimum(per_unit, starts[span] + lengths[span] - first)
    rows = _rows_of(starts, lengths)
    # Rows of the chosen spans, side by side: a unit is a segment of them.
    segment = np.cumsum(count) - count
    visible = masks.visible[rows]
    plain = visible if masks.tree_start is None else np.minimum(visible, masks.tree_start[rows])
    hi = np.maximum.reduceat(visible, segment)
    inner_hi = np.minimum.reduceat(plain, segment) // keys * keys
    if masks.low is None:
        lo = inner_lo = np.zeros_like(hi)
    else:
        low = masks.low[rows]
        lo = np.minimum(np.minimum.reduceat(low, segment), hi)
        inner_lo = -(-np.maximum.reduceat(low, segment) // keys) * keys
    base = lo // keys * keys
    has_inner = inner_hi > inner_lo
    inner_lo, inner_hi = np.where(has_inner, inner_lo, base), np.where(has_inner, inner_hi, base)
    tiles = np.maximum(1, -(-(hi - base) // keys))
    order = np.argsort(-tiles, kind="stable")
    units = np.stack((row_seq[first], first, count, lo, inner_lo, inner_hi, hi, np.zeros_like(hi)), axis=1)[order]
    cum = np.zeros(len(units) + 1, dtype=np.int32)
    np.cumsum(tiles[order], out=cum[1:])
    total = int(cum[-1]) * num_kv
    budget = max(geometry.min_tiles, -(-total // geometry.num_programs))
    return Launch(geometry, units.astype(np.int32, copy=False), cum, budget, total)


def _rows_of(starts: Ints, lengths: Ints) -> NDArray[np.int64] | slice:
    """Indices of the rows of some spans, one after the other; a slice where they already are."""
    total = int(lengths.sum())
    if int(starts[-1] + lengths[-1] - starts[0]) == total:
        return slice(int(starts[0]), int(starts[0]) + total)
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(total)

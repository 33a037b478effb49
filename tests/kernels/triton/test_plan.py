"""The balanced plan: every tile once, equal pieces, bounded scratch, and the gains that need no GPU to be shown."""

from __future__ import annotations

import heapq
import random
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.triton.plan import (
    CUT_KEYS,
    LARGE_CUT_KEYS,
    NO_TREE,
    WHOLE,
    Launch,
    StepRows,
    plan_launch,
    plan_step,
    row_masks,
)
from kernels.triton.tiles import Geometry, large_geometry, small_geometry

PIECE_COST = 1.5
"""Fixed cost of a piece in tiles, as in attention.md 2.3's simulations."""


def step(kv_lens: list[int], rows: list[int] | int = 1) -> StepRows:
    """Causal spans that end at kv_len each."""
    lengths = np.asarray([rows] * len(kv_lens) if isinstance(rows, int) else rows)
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    spans = zip(kv_lens, lengths, strict=True)
    positions = np.concatenate([np.arange(kv - n, kv, dtype=np.int32) for kv, n in spans])
    row_seq = np.repeat(np.arange(len(kv_lens), dtype=np.int32), lengths)
    return StepRows(row_seq, positions, positions + 1, bounds)


def launches(
    rows: StepRows, window: int | None = None, group: int = 4, num_kv: int = 8, sms: int = 132
) -> list[Launch]:
    return plan_step(rows, row_masks(rows, window), group, num_kv, 128, 2, sms)


def pieces(launch: Launch) -> list[tuple[int, int, int, int]]:
    """(program, head, unit, tiles) of every piece, as the kernel walks them."""
    found, per_head, cum = [], int(launch.cum[-1]), launch.cum
    for program in range(launch.geometry.num_programs):
        x, end = program * launch.budget, min((program + 1) * launch.budget, launch.total)
        while x < end:
            head, tile = divmod(x, per_head)
            unit = int(np.searchsorted(cum, tile, side="right")) - 1
            stop = min(head * per_head + int(cum[unit + 1]), end)
            found.append((program, head, unit, stop - x))
            x = stop
    return found


def mixed(seed: int) -> StepRows:
    generator = random.Random(seed)
    rows = [generator.choice([1, 1, 1, 3, 8, 40, 300]) for _ in range(generator.randint(1, 40))]
    return step([n + generator.choice([0, 5, 63, 64, 1000, 20_000]) for n in rows], rows)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("seed", range(8))
def test_every_tile_belongs_to_one_piece_and_every_row_to_one_unit(seed: int, window: int | None) -> None:
    rows = mixed(seed)
    planned = launches(rows, window, sms=random.Random(seed).choice([1, 7, 132]))
    covered: list[int] = []
    for launch in planned:
        tiles = np.diff(launch.cum)
        done = np.zeros((8, len(launch.units)), dtype=np.int64)
        for _, head, unit, count in pieces(launch):
            done[head, unit] += count
        assert (done == tiles).all(), "each key tile is read once for each unit and head"
        keys = launch.geometry.tile_keys
        for (_, first, count, lo, inner_lo, inner_hi, hi, _), size in zip(launch.units.tolist(), tiles, strict=True):
            seen = range(first, first + count)
            covered += seen
            low = [0 if window is None else max(0, int(rows.positions[row]) - window + 1) for row in seen]
            visible = [int(rows.visible[row]) for row in seen]
            assert (lo, hi) == (min(low), max(visible))
            assert size == max(1, -(-(hi - lo // keys * keys) // keys)), "no tile without a key that some row sees"
            if inner_lo < inner_hi:
                assert max(low) <= inner_lo <= inner_hi <= min(visible)
            assert inner_lo % keys == inner_hi % keys == 0
    assert sorted(covered) == list(range(len(rows.row_seq)))


@pytest.mark.parametrize("seed", range(8))
def test_mistake_4_scratch_is_two_slots_a_program_whatever_the_batch(seed: int) -> None:
    for launch in launches(mixed(seed)):
        whole: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for program, head, unit, count in pieces(launch):
            whole.setdefault((head, unit), []).append((program, count))
        slots = [program for parts in whole.values() if len(parts) > 1 for program, _ in parts]
        assert max((slots.count(program) for program in set(slots)), default=0) <= 2
        assert launch.geometry.num_programs <= 2 * 132


def makespan(costs: list[float], workers: int) -> float:
    """Greedy, in the given order: what a GPU does with more programs than fit."""
    heap = [0.0] * workers
    for cost in costs:
        heapq.heappush(heap, heapq.heappop(heap) + cost)
    return max(heap)


def balanced_makespan(launch: Launch) -> float:
    time_of = np.zeros(launch.geometry.num_programs)
    for program, _, _, tiles in pieces(launch):
        time_of[program] += tiles + PIECE_COST
    return float(time_of.max())


def fixed_makespan(kv_lens: list[int], heads: int, splits: int, workers: int) -> float:
    """Every sequence and head cut into `splits` segments, which are scheduled as they come."""
    costs = [-(-kv // 64) / splits + PIECE_COST for kv in kv_lens for _ in range(heads * splits)]
    return makespan(sorted(costs, reverse=True), workers)


@pytest.mark.parametrize("heads", [1, 8])
def test_a_skewed_batch_is_twice_as_fast_as_with_a_fixed_split(heads: int) -> None:
    kv_lens = [131_072] + [4096] * 31
    (launch,) = launches(step(kv_lens), num_kv=heads)
    ours = balanced_makespan(launch)
    assert 2 * ours <= fixed_makespan(kv_lens, heads, 8, launch.geometry.num_programs)


def test_an_even_batch_loses_nothing_to_the_best_fixed_split() -> None:
    kv_lens = [4096] * 64
    (launch,) = launches(step(kv_lens))
    best = min(fixed_makespan(kv_lens, 8, splits, launch.geometry.num_programs) for splits in (1, 2, 4, 8, 16))
    assert balanced_makespan(launch) <= 1.05 * best


@pytest.mark.parametrize("num_rows", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 4, 12, 64])
def test_mistake_1_work_is_shared_whatever_the_batch_and_the_rows(batch: int, num_rows: int) -> None:
    """No cliff: the longest program's share is the average, rounded up to a tile, for verify spans as for decodes."""
    (launch,) = launches(step([7400] * batch, num_rows), num_kv=8)
    assert launch.budget == max(launch.geometry.min_tiles, -(-launch.total // launch.geometry.num_programs))
    per_row = launches(step([7400] * batch))[0]
    if num_rows * 4 <= 64:
        assert launch.total == per_row.total, "rows of one span share the keys they read"


def test_long_and_short_spans_get_a_geometry_each() -> None:
    found = launches(step([100, 3000, 100, 2048], [1, 2048, 4, 40]))
    assert [launch.geometry.tile_rows for launch in found] == [16, 128]
    assert sorted(found[0].units[:, 0].tolist()) == [0, 2]
    assert set(found[1].units[:, 0].tolist()) == {1, 3}
    nothing = np.zeros(0, np.int32)
    assert launches(StepRows(nothing, nothing, nothing, np.zeros(1, np.int32))) == []


def test_empty_spans_have_no_unit() -> None:
    rows = step([50, 60], [1, 2])
    holes = StepRows(rows.row_seq, rows.positions, rows.visible, np.array([0, 0, 1, 1, 3, 3], np.int32))
    (launch,) = launches(holes)
    assert sorted(launch.units[:, 1].tolist()) == [0, 1]


def test_masks_of_trees_keep_their_last_bits_under_a_window() -> None:
    masks = [0, 1, 0b1011, (1 << 64) - 1, 1 << 63, 0xF0F0_0000_0000_0001]
    signed: NDArray[np.int64] = np.array(masks, dtype=np.uint64).view(np.int64)
    n = len(masks)
    ints = np.arange(n, dtype=np.int32)
    rows = StepRows(ints, ints + 100, ints + 101, np.array([0, n], np.int32), signed, ints + 50)
    for window in (None, 1, 3, 64, 1000):
        found = row_masks(rows, window)
        assert found.tree is not None
        assert found.tree_start is not None
        words = found.tree.view(np.uint32).astype(object)
        for at, mask in enumerate(masks):
            bits = [i for i in range(64) if mask >> i & 1]
            kept = bits if window is None else bits[-window:]
            assert words[at, 0] | words[at, 1] << 32 == sum(1 << bit for bit in kept)
            assert found.tree_start[at] == (50 + at if mask else NO_TREE), "mistake 17: a row without a tree has none"
            assert found.visible[at] == (50 + at + bits[-1] + 1 if mask else 101 + at)


def test_geometries_hold_every_group_and_stay_powers_of_two() -> None:
    for group in (1, 3, 8, 71, 128):
        for packed in (group, 64):
            for geometry in (small_geometry(packed, group, 80, 2, 100), large_geometry(group, 256, 4, 100)):
                assert geometry.tile_rows >= group
                assert geometry.tile_rows & (geometry.tile_rows - 1) == 0


def test_planning_takes_a_fraction_of_a_millisecond() -> None:
    """The goal is 0.1 ms for 256 sequences (measured time in kernels/README.md); ten times that is no noise."""
    rows, times = step(np.random.default_rng(0).integers(1, 8000, 256).tolist()), []
    for _ in range(30):
        before = time.perf_counter()
        launches(rows)
        times.append(time.perf_counter() - before)
    assert min(times) < 1e-3


def test_one_program_does_everything_alone() -> None:
    rows = step([70, 300], 2)
    starts, lengths = rows.span_starts[:-1], np.diff(rows.span_starts)
    geometry = Geometry(16, 64, 4, 3, 1)
    launch = plan_launch(rows.row_seq, starts, lengths, row_masks(rows, None), 4, 2, geometry)
    assert launch.num_pieces == 1
    assert launch.shared_among(5).budget == -(-launch.total // 5)


@pytest.mark.parametrize("window", [None, 5000])
def test_fixed_cuts_and_tiles_depend_on_a_span_alone(window: int | None) -> None:
    """A span's units, and the geometry that walks them, are the same beside any others; nothing else cuts them."""

    def units(kv_lens: list[int], rows: list[int], at: int) -> tuple[Geometry, set[tuple[int, ...]]]:
        found = step(kv_lens, rows)
        planned = plan_step(found, row_masks(found, window), 4, 8, 128, 2, 132, deterministic=True)
        first = int(found.span_starts[at])
        for launch in planned:
            own = [unit for unit in launch.units.tolist() if unit[0] == at]
            if own:
                assert launch.is_whole
                return launch.geometry, {(unit[1] - first, *unit[2:]) for unit in own}
        raise AssertionError("the span has no unit")

    for kv_len, num_rows in ((9000, 1), (9000, 7), (2048, 1), (70_000, 300)):
        alone = units([kv_len], [num_rows], 0)
        assert units([50, kv_len, 5000, 9000], [1, num_rows, 16, 400], 1) == alone
        if window is None:
            cut = CUT_KEYS if num_rows * 4 <= 64 else LARGE_CUT_KEYS
            assert all(unit[2] % cut == 0 and unit[5] - unit[2] <= cut for unit in alone[1])
            assert {unit[6] for unit in alone[1]} == ({0} if kv_len > cut else {WHOLE})

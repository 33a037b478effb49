"""Tile shapes of paged attention: one small and one large geometry per head size and element size.

The figures come from compile-only runs (`attention.md` 2.7: registers, spills, shared memory), not from a GPU yet;
`tests/kernels/triton/test_compiled.py` holds them. Where `tile_table.py` has a measurement of this GPU, that counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.triton.tile_table import WorkClass, current_table

SMALL_ROWS = 64
"""Spans of up to this many packed rows (rows x query heads per kv head) go to the small geometry."""
_EXACT_ROWS = 32
MAX_GROUP = 128
"""Most query heads per kv head: they share a tile."""


@dataclass(frozen=True)
class Geometry:
    """One specialisation of the attention kernel.

    tile_rows     packed rows of a tile, a power of two from 16 on; heads of one kv head stand side by side
    tile_keys     keys of a tile, a power of two from 16 on
    num_programs  pieces that the tile space is cut into
    min_tiles     least tiles of a piece: below it, more programs cost more than they share
    """

    tile_rows: int
    tile_keys: int
    num_warps: int
    num_stages: int
    num_programs: int
    min_tiles: int = 2


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def padded_dim(head_dim: int) -> int:
    """Width of a tile that holds one head; the columns past `head_dim` are masked."""
    return max(16, next_power_of_two(head_dim))


def small_geometry(packed_rows: int, group: int, head_dim: int, itemsize: int, num_sms: int) -> Geometry:
    """For decode, verify and short denoise spans: up to `packed_rows` <= 64 packed rows, or one row of a wide group."""
    if itemsize == 4:
        return _exact_geometry(packed_rows, group, num_sms)
    rows = max(16, next_power_of_two(max(packed_rows, group)))
    if (measured := _measured(WorkClass(rows, padded_dim(head_dim), itemsize), rows, num_sms)) is not None:
        return measured
    wide = padded_dim(head_dim) > 128
    resident = 1 if wide or rows > 64 else 2
    return Geometry(rows, 32 if wide else 64, 8 if rows >= 64 else 4, 2 if wide else 3, resident * num_sms)


def large_geometry(group: int, head_dim: int, itemsize: int, num_sms: int) -> Geometry:
    """For prefill chunks and long denoise spans."""
    if itemsize == 4:
        return _exact_geometry(_EXACT_ROWS, group, num_sms)
    if (measured := _measured(WorkClass(0, padded_dim(head_dim), itemsize), group, num_sms)) is not None:
        return measured
    wide = padded_dim(head_dim) > 128
    rows = max(64 if wide else 128, next_power_of_two(group))
    return Geometry(rows, 32 if wide else 64, 8, 2 if wide else 3, num_sms)


def _measured(work: WorkClass, least_rows: int, num_sms: int) -> Geometry | None:
    """The measured shape of this class of work, if there is one and `least_rows` fit into its tile."""
    tile = current_table().get(work)
    if tile is None or tile.tile_rows < least_rows:
        return None
    programs = tile.programs_per_sm * num_sms
    return Geometry(tile.tile_rows, tile.tile_keys, tile.num_warps, tile.num_stages, programs, tile.min_tiles)


def _exact_geometry(packed_rows: int, group: int, num_sms: int) -> Geometry:
    """For float32, whose exact products use no matrix unit: wider tiles only spill registers."""
    rows = max(16, next_power_of_two(max(min(packed_rows, _EXACT_ROWS), group)))
    return Geometry(rows, 32, 8, 2, num_sms)

"""Rows whose keys lie in several units: fixed cuts (deterministic mode) and shared prefixes (the cascade)."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from kernels.blocks import AttentionForm
from kernels.triton import parts, plan
from kernels.triton.paged import PagedAttention, Shape
from tests.kernels.cpu.worlds import Shape as Heads
from tests.kernels.test_trees import MASK_ALL, Piece, World, tree
from tests.kernels.triton.worlds import AttentionOps, check, definition, errors_in_bounds, poisoned

PIECES = [Piece(200, 1), Piece(31, 5), Piece(150, 4), Piece(0, 40), Piece(60, 9, MASK_ALL), Piece(3, 1)]


class Deterministic(AttentionOps):
    def __init__(self, num_programs: int) -> None:
        super().__init__(num_programs)
        self.attention = PagedAttention(1, num_programs, deterministic=True)


@pytest.fixture
def short_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CUT_KEYS", 64)
    monkeypatch.setattr(plan, "LARGE_CUT_KEYS", 128)


def step(num_programs: int, window: int | None, chosen: list[int]) -> list[Tensor]:
    """Each chosen piece's rows of one step, in the order of PIECES."""
    world = World(Deterministic(num_programs), Heads(2, 1, 16, 16), PIECES)
    with poisoned():
        out = world.step(window, chosen)
    sizes = [PIECES[index].num_rows for index in chosen]
    return [part for _, part in sorted(zip(chosen, torch.split(out, sizes), strict=True), key=lambda pair: pair[0])]


@pytest.mark.parametrize("window", [None, 50])
def test_a_rows_bits_do_not_depend_on_the_batch_or_on_the_number_of_programs(
    window: int | None, short_cuts: None
) -> None:
    together = step(3, window, [0, 1, 2, 3, 4, 5])
    for num_programs, chosen in ((1, [5, 3, 1, 0, 2, 4]), (17, [2, 0, 4]), (2, [1]), (5, [3, 0])):
        for index, part in zip(sorted(chosen), step(num_programs, window, chosen), strict=True):
            assert torch.equal(part, together[index]), f"piece {index} among {chosen}, {num_programs} programs"


def test_fixed_cuts_are_exact(short_cuts: None) -> None:
    world = World(Deterministic(4), Heads(6, 2, 40, 16), [*PIECES, tree(random.Random(3), 90, 12)])
    with poisoned():
        actual = world.step()
    expected, mass = definition(world, None)
    assert errors_in_bounds(actual, expected, mass, 40).max() <= 1
    (found,) = world.ops.attention._plans.values()  # type: ignore[attr-defined]
    assert found.parts is not None, "rows of more keys than a cut have parts"


def shared(group: int, dtype: torch.dtype = torch.float32) -> tuple[World, list[Piece]]:
    """Sequences of which 0-3 share 192 keys, 0-1 of those 256, and 4-5 others; written through the first of each."""
    pieces = [Piece(300, 1), Piece(270, 3), Piece(230, 1), Piece(200, 8), Piece(140, 1), Piece(133, 2), Piece(9, 1)]
    world = World(AttentionOps(3), Heads(group, 1, 16, 16, dtype), pieces)
    for members, keys in (([0, 1, 2, 3], 192), ([0, 1], 256), ([4, 5], 128)):
        for member in members[1:]:
            world.table[member, : keys // 16] = world.table[members[0], : keys // 16]
            world.qkv[member][:keys] = world.qkv[members[0]][:keys]
    return world, pieces


@pytest.mark.parametrize(("group", "dtype"), [(3, torch.float32), (2, torch.float16)])
def test_a_cascade_equals_no_cascade(group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CUT_BYTES", 0)
    monkeypatch.setattr("kernels.triton.paged.CUT_BYTES", 0)
    world, _ = shared(group, dtype)
    with poisoned():
        actual = world.step()
    (found,) = world.ops.attention._plans.values()  # type: ignore[attr-defined]
    assert found.parts is not None
    listed = [launch for launch in found.launches if launch.is_listed]
    assert len(listed) == 1
    ranges = {(unit[3], unit[6]) for unit in listed[0].units.view(-1, 8).tolist()}
    assert ranges == {(0, 128), (0, 192), (192, 256)}
    expected, mass = definition(world, None)
    assert errors_in_bounds(actual, expected, mass, 16).max() <= 1
    without = PagedAttention(1, 3, cascade=False)
    rows = world.rows(list(range(len(world.pieces))))
    q = torch.cat([x[p.start :, : group * 16] for x, p in zip(world.qkv, world.pieces, strict=True)]).view(
        -1, group, 16
    )
    plain = without.run(q, world.k, world.v, rows, 0.25, None)
    again = world.ops.attention.run(q, world.k, world.v, rows, 0.25, None)  # type: ignore[attr-defined]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(again, plain, rtol=tolerance, atol=tolerance)
    logits = AttentionForm(softcap=20.0, sink_logits_Q=torch.linspace(-1, 3, group))
    torch.testing.assert_close(
        world.ops.attention.run(q, world.k, world.v, rows, 0.25, None, logits),  # type: ignore[attr-defined]
        without.run(q, world.k, world.v, rows, 0.25, None, logits), rtol=tolerance, atol=tolerance,
    )  # fmt: skip


def test_prefixes_are_read_once_only_where_that_pays_and_where_all_rows_see_them() -> None:
    world, pieces = shared(2)
    rows = world.rows(list(range(len(pieces))))
    shape = Shape(None, 0, 2, 1, 16, 16, 4, 4)
    few = PagedAttention(1, 3).plan(rows, shape)
    assert few.parts is None, "a few KB are not worth a cut"
    wide = PagedAttention(1, 3).plan(rows, dataclasses.replace(shape, head_dim=16 << 10))
    assert wide.parts is not None
    windowed = PagedAttention(1, 3).plan(rows, dataclasses.replace(shape, head_dim=16 << 10, window=10))
    assert windowed.parts is None, "rows under a window do not see the prefix"
    blind = dataclasses.replace(rows, visible=rows.visible.clamp_max(60))
    assert PagedAttention(1, 3).plan(blind, dataclasses.replace(shape, head_dim=16 << 10)).parts is None


def test_a_cascade_reads_each_shared_key_once() -> None:
    """Algorithmic bytes: n sharers of a prefix read it once, not n times."""
    world, pieces = shared(2)
    rows = world.rows(list(range(len(pieces))))
    shape = Shape(None, 0, 2, 1, 16 << 10, 16, 4, 4)

    def tiles(attention: PagedAttention) -> int:
        return sum(int(launch.cum.max()) for launch in attention.plan(rows, shape).launches)

    keys = 32  # of a float32 tile
    saved = (3 * 192 + 64 + 128) // keys
    assert tiles(PagedAttention(1, 3, cascade=False)) - tiles(PagedAttention(1, 3)) == saved


def test_steps_without_shared_pages_have_no_parts() -> None:
    check(PIECES, Heads(2, 1, 16, 16), None, 3)

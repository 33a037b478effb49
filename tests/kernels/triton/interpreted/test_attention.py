"""Paged attention in the interpreter against its definition: awkward shapes, poison, and the mistakes others made."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys

import pytest
import torch

from kernels.triton.paged import PagedAttention
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_trees import MASK_ALL, Piece, World, crowd, tree
from tests.kernels.triton import worlds
from tests.kernels.triton.worlds import AttentionOps, check, definition, errors_in_bounds

DECODES = [Piece(start, 1) for start in (0, 1, 15, 16, 31, 63, 64, 127, 511)]


@pytest.mark.parametrize(("window", "num_programs"), [(None, 1), (None, 11), (3, 3), (21, 4)])
def test_a_crowd_of_trees_chunks_and_blocks_equals_its_definition(window: int | None, num_programs: int) -> None:
    check(crowd(3), Shape(6, 2, 40, 16), window, num_programs)


@pytest.mark.parametrize("page_size", [1, 7, 16, 32, 64, 128])
def test_pages_of_every_size(page_size: int) -> None:
    check([*DECODES, Piece(60, 9), tree(random.Random(1), 70, 12)], Shape(2, 1, 64, page_size), None, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 64])
def test_half_precision(page_size: int, dtype: torch.dtype) -> None:
    check([*DECODES, Piece(60, 9), tree(random.Random(1), 70, 12)], Shape(4, 2, 64, page_size, dtype), None, 5)


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 256])
def test_heads_of_every_size(head_dim: int) -> None:
    check([Piece(100, 1), Piece(3, 70), Piece(64, 1)], Shape(2, 1, head_dim, 64), None, 4)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16, 24, 71])
def test_groups_of_every_size(group: int) -> None:
    """Groups that are no power of two leave rows of a tile empty; large ones fill several."""
    pieces = [Piece(70, 1), Piece(0, 9), tree(random.Random(2), 65, 5)]
    check(pieces, Shape(group, 1, 16, 64), None, 3)


@pytest.mark.parametrize("window", [1, 5, 64, 65, 1000])
def test_windows(window: int) -> None:
    pieces = [*DECODES[3:], Piece(130, 70), Piece(64, 64), Piece(0, 1)]
    check(pieces, Shape(2, 1, 16, 64), window, 7, "one-hot")


@pytest.mark.parametrize("values", ["one-hot", "huge", "equal", "outlier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_make_mistakes_visible(values: str, dtype: torch.dtype) -> None:
    pieces = [tree(random.Random(5), 40, 33), Piece(0, 70), Piece(200, 1), Piece(16, 16, 8), Piece(31, 5)]
    check(pieces, Shape(2, 1, 16, 16, dtype), None, 5, values)


def test_blocks_of_diffusion_and_bidirectional_rows() -> None:
    blocks = [Piece(32, 16, 16), Piece(0, 32, 32), Piece(96, 32, 8), Piece(0, 50, MASK_ALL), Piece(7, 1)]
    check(blocks, Shape(4, 1, 32, 32), None, 6, "one-hot")


def test_a_row_that_sees_nothing_is_zero_and_a_step_without_rows_is_empty() -> None:
    world = World(AttentionOps(3), Shape(), [Piece(70, 2), Piece(0, 1)])
    q = torch.randn(3, 4, 64)
    rows = world.rows([0, 1])
    blind = dataclasses.replace(rows, visible=torch.zeros_like(rows.visible))
    assert torch.equal(world.ops.paged_attention(q, world.k, world.v, blind, 1.0), torch.zeros(3, 4, 64))
    nobody = dataclasses.replace(
        rows, row_seq=rows.row_seq[:0], positions=rows.positions[:0], visible=rows.visible[:0], slots=rows.slots[:0],
        span_starts=rows.span_starts[:1],
    )  # fmt: skip
    assert world.ops.paged_attention(q[:0], world.k, world.v, nobody, 1.0).shape == (0, 4, 64)


def test_a_nan_query_spoils_its_own_row_only() -> None:
    world = World(AttentionOps(2), Shape(), [Piece(40, 3)])
    world.step()
    rows, q = world.rows([0]), torch.randn(3, 4, 64)
    q[1, 2] = float("nan")
    out = world.ops.paged_attention(q, world.k, world.v, rows, 0.1)
    assert out[1, 2].isnan().all()
    assert not out[[0, 2]].isnan().any()
    assert not out[1, [0, 1, 3]].isnan().any()


def test_mistake_15_the_number_of_programs_changes_rounding_only() -> None:
    """Partial results in one base merged in another would show."""
    shape, pieces = Shape(2, 1, 32, 64), [Piece(500, 1), Piece(3, 1), Piece(200, 6), Piece(0, 40)]
    results = [check(pieces, shape, None, num_programs) for num_programs in (1, 2, 5, 16)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_permuted_sequences_give_permuted_results() -> None:
    shape, pieces = Shape(2, 1, 32, 16), [Piece(90, 1), Piece(3, 1), Piece(20, 6), Piece(150, 4)]
    order = [2, 0, 3, 1]
    world = World(AttentionOps(3), shape, pieces)
    straight, permuted = world.step(), world.step(None, order)
    at, first = 0, [0, 1, 2, 8]
    for index in order:
        count = pieces[index].num_rows
        here = straight[first[index] : first[index] + count]
        torch.testing.assert_close(permuted[at : at + count], here, rtol=1e-5, atol=1e-5)
        at += count


def test_two_sequences_on_the_same_pages() -> None:
    world = World(AttentionOps(3), Shape(), [Piece(64, 1), Piece(64, 1)])
    world.step()
    rows = world.rows([0, 1])
    table = rows.page_table.clone()
    table[1] = table[0]
    q = torch.randn(1, 4, 64).repeat(2, 1, 1)
    out = world.ops.paged_attention(q, world.k, world.v, dataclasses.replace(rows, page_table=table), 0.1)
    torch.testing.assert_close(out[0], out[1], rtol=1e-6, atol=1e-6)


def test_what_no_kernel_can_run_is_refused() -> None:
    world = World(AttentionOps(1), Shape(), [Piece(4, 1)])
    attention, rows, q = PagedAttention(1, 1), world.rows([0]), torch.zeros(1, 4, 64)
    with pytest.raises(TypeError, match=r"q is torch\.float16"):
        attention.run(q.half(), world.k, world.v, rows, 1.0, None)
    with pytest.raises(ValueError, match="contiguous"):
        attention.run(q, world.k.transpose(1, 2), world.v.transpose(1, 2), rows, 1.0, None)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        attention.run(q[:, :3], world.k, world.v, rows, 1.0, None)
    with pytest.raises(ValueError, match="come together"):
        attention.run(q, world.k, world.v, dataclasses.replace(rows, tree=torch.ones(1).long()), 1.0, None)


def test_mistake_2_offsets_of_32_bits() -> None:
    """A pool of more than 2^31 elements is virtual memory; an offset that wraps reads outside it and dies."""
    code = """
import torch
from kernels.ops import AttentionRows
from kernels.triton.paged import PagedAttention
pages = (2**31 + 2**23) // (64 * 64)
pool = torch.empty(pages, 1, 64, 64, dtype=torch.float16)
pool[-1] = 1.0
pool[-1, 0, 5:] = float("nan")
one = torch.tensor([0], dtype=torch.int32)
rows = AttentionRows(one[None] + pages - 1, one, one + 4, one + 5, one.long(), torch.tensor([0, 1], dtype=torch.int32))
out = PagedAttention(1, 2).run(torch.ones(1, 1, 64).half(), pool, pool, rows, 0.1, None)
assert (out == 1).all(), out
print("read the last page")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stderr[-2000:]}"
    assert "read the last page" in result.stdout


def test_mistake_3_and_17_masks_are_of_rows_not_of_batches() -> None:
    """Causal, bidirectional, block and tree rows in one launch give each what it gets alone."""
    pieces = [Piece(9, 5), Piece(0, 9, MASK_ALL), Piece(16, 16, 8), tree(random.Random(4), 30, 9), Piece(77, 1)]
    shape, first = Shape(2, 1, 16, 16), 0
    together = check(pieces, shape, None, 3, "one-hot")
    world = World(AttentionOps(1), shape, pieces)
    worlds.shape_values(world, "one-hot")
    for index, piece in enumerate(pieces):
        alone = world.step(None, [index])
        torch.testing.assert_close(together[first : first + piece.num_rows], alone, rtol=1e-5, atol=1e-6)
        first += piece.num_rows


def test_mistake_12_what_nobody_wrote_is_not_multiplied() -> None:
    """Slots around each sequence are NaN (test worlds always are); here also those that a window has left behind."""
    world = World(AttentionOps(3), Shape(2, 1, 16, 16), [Piece(200, 3), Piece(90, 1)])
    expected, mass = definition(world, 20)
    world.step(20)
    for index, piece in enumerate(world.pieces):
        gone = world.table[index, : (piece.start - 20 + 1) // 16]
        world.k[gone.long()] = world.v[gone.long()] = float("nan")
        world.table[index, : len(gone)] = -7
    rows = world.rows([0, 1])
    parts = [qkv[piece.start :, :32].view(-1, 2, 16) for qkv, piece in zip(world.qkv, world.pieces, strict=True)]
    actual = world.ops.paged_attention(torch.cat(parts), world.k, world.v, rows, 16**-0.5, 20)
    assert errors_in_bounds(actual, expected, mass, 16).max() <= 1


@pytest.mark.parametrize("off_by", [-1, 1])
def test_mistake_13_the_bounds_see_one_wrong_key_among_hundreds(off_by: int) -> None:
    piece, shape = Piece(505, 1), Shape(2, 1, 64, 64)
    world = World(AttentionOps(4), shape, [piece])
    worlds.shape_values(world, "one-hot")
    world.step()
    world.k[world.k.isnan()] = 0.0
    world.v[world.v.isnan()] = 1.0
    rows = world.rows([0])
    wrong = dataclasses.replace(rows, visible=rows.visible + off_by)
    q = world.qkv[0][-1:, :128].view(1, 2, 64)
    actual = world.ops.paged_attention(q, world.k, world.v, wrong, 64**-0.5)
    expected, mass = definition(world, None)
    assert errors_in_bounds(actual, expected, mass, 64).max() > 1

"""Pages of int8 and fp8: the bytes that the kernels write are the twin's, and they read what is there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.kv_format import FP8
from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps
from kernels.triton.gpu_checks import SMALL, Span, make_world, stored_error
from kernels.triton.ops import TritonOps
from tests.kernels.triton.worlds import poisoned

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ops() -> TritonOps:
    return TritonOps(num_programs=3)


def written(ops: ReferenceOps | TritonOps, qkv: Tensor, stored: torch.dtype, scale: Tensor | None) -> Tensor:
    """All bytes of K and V pages after one step of rows with 1 query and 2 kv heads of 24, of which 16 turn by 0."""
    num = len(qkv)
    ints = torch.arange(num, dtype=torch.int32)
    rows = AttentionRows(
        ints[None] * 0, ints * 0, ints, ints + 1, torch.arange(num) * 3 + 1, torch.tensor([0, num]).int()
    )
    pages = ops.allocate_kv(num, 4, 2, 24, stored, CPU)
    for pool in pages:
        pool.view(torch.uint8).fill_(0)
    table = torch.cat((torch.ones(num, 8), torch.zeros(num, 8)), 1)
    ops.qkv_rope_write(qkv, 1, 2, 24, table, None, None, 1e-6, *pages, rows, scale)
    return torch.stack(pages).view(torch.uint8)


def ladder(num_rows: int) -> Tensor:
    """Every fp8 value, what lies halfway between two, a little more and less, and what is out of range."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    grid = torch.unique(codes[codes.isfinite()])
    middle = (grid[1:] + grid[:-1]) / 2
    values = [
        grid,
        middle,
        middle * (1 + 2**-20),
        middle * (1 - 2**-20),
        torch.tensor([447.9, 500.0, 1e30, -1e30, 1e-9]),
    ]
    flat = torch.cat([*values, torch.tensor([math.inf, -math.inf, 0.0, -0.0])])
    return flat.repeat(-(-num_rows * 120 // len(flat)))[: num_rows * 120].view(num_rows, 120)


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_codes_are_those_of_the_twin_bit_for_bit(ops: TritonOps, scaled: bool) -> None:
    scale = torch.tensor([[0.3, 1.0], [2.0, 0.007]]) if scaled else None
    qkv = ladder(14)
    with poisoned():
        actual = written(ops, qkv, FP8, scale)
    assert torch.equal(actual, written(ReferenceOps(), qkv, FP8, scale))
    assert len(torch.unique(actual)) > 200, "nearly all codes were written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_codes_and_scales_are_those_of_the_twin_bit_for_bit(ops: TritonOps, dtype: torch.dtype) -> None:
    qkv = (torch.randn(9, 120) * torch.logspace(-4, 2, 9)[:, None]).to(dtype)
    qkv[0] = 0.0
    qkv[1, 30] = math.nan
    assert torch.equal(written(ops, qkv, torch.int8, None), written(ReferenceOps(), qkv, torch.int8, None))


@pytest.mark.parametrize("stored", [torch.int8, FP8])
def test_moves_take_scales_along(ops: TritonOps, stored: torch.dtype) -> None:
    pages = ops.allocate_kv(3, 5, 2, 12, stored, CPU)
    for pool in pages:
        pool.view(torch.uint8).random_(0, 120)
    twins = [pool.clone() for pool in pages]
    moves = torch.tensor([4, 9, 10, 12]), torch.tensor([3, 4, 9, 10])
    ops.move_kv(*pages, *moves)
    ReferenceOps().move_kv(twins[0], twins[1], *moves)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(pages, twins, strict=True))


@pytest.mark.parametrize("stored", [torch.int8, FP8, torch.float16])
@pytest.mark.parametrize(("dtype", "page", "window"), [(torch.float32, 64, None), (torch.float16, 16, 21)])
def test_attention_over_stored_codes(
    ops: TritonOps, stored: torch.dtype, dtype: torch.dtype, page: int, window: int | None
) -> None:
    world = make_world([*SMALL, Span(200, 1)], 6, 2, 40, page, dtype, CPU)
    assert stored_error(ops, world, stored, window) <= 1


def test_pages_that_do_not_fit_the_rows_are_refused(ops: TritonOps) -> None:
    world = make_world([Span(9, 1)], 2, 1, 16, 16, torch.float16, CPU)
    pages = ops.allocate_kv(2, 16, 1, 16, torch.bfloat16, CPU)
    with pytest.raises(TypeError, match=r"pages are torch\.bfloat16"):
        ops.paged_attention(world.q_TQD, *pages, world.rows, 1.0)
    pages = ops.allocate_kv(2, 16, 1, 16, torch.int8, CPU)
    with pytest.raises(ValueError, match="only fp8 pages take one"):
        ops.paged_attention(world.q_TQD, *pages, world.rows, 1.0, kv_scale_2K=torch.ones(2, 1))

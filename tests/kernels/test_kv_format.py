"""What pages of other dtypes hold: the codecs against their definition, records that travel whole, and attention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kernels.blocks import AttentionForm
from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.kv_format import (
    FP8,
    encode_fp8,
    encode_int8,
    head_dim_of,
    read_pages,
    slot_bytes,
    split_record,
    write_slots,
)
from kernels.reference import ReferenceOps
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_trees import Piece, World, crowd

CPU = torch.device("cpu")


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 5


def test_int8_is_within_half_a_step_of_each_rows_greatest_element() -> None:
    x = rows_of(50, 3, 64)
    x[0, 0] = 0.0
    codes, scale = encode_int8(x)
    assert codes.abs().max() == 127
    assert ((codes * scale.unsqueeze(-1)) - x).abs().sub(scale.unsqueeze(-1) / 2).max() <= 1e-6
    assert torch.equal(codes[0, 0], torch.zeros(64, dtype=torch.int8))
    x[1, 1, 5] = math.nan
    assert encode_int8(x)[1].isnan().nonzero().tolist() == [[1, 1]], "a NaN shows in its own row's scale alone"


def test_fp8_rounds_to_the_nearest_code_of_the_scaled_value_and_never_overflows() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    grid = torch.unique(codes[codes.isfinite()])
    x, scale = rows_of(40, 2, 16), torch.tensor([0.5, 3.0])
    x[0, 0, :4] = torch.tensor([1e9, -1e9, 448.0 * 0.5, 240.0])
    stored = encode_fp8(x, scale).float()
    exact = (x / scale[:, None]).clamp(-448, 448)
    assert torch.equal((stored - exact).abs(), (grid - exact.unsqueeze(-1)).abs().amin(-1))


@pytest.mark.parametrize("dtype", [torch.int8, FP8, torch.bfloat16, torch.float32])
def test_pages_give_back_what_was_written_and_touch_nothing_else(dtype: torch.dtype) -> None:
    ops, x = ReferenceOps(), rows_of(3, 2, 12)
    pages, _ = ops.allocate_kv(4, 5, 2, 12, dtype, CPU)
    pages.view(torch.uint8).fill_(0)
    assert (head_dim_of(pages), pages.nbytes) == (12, 4 * 5 * 2 * slot_bytes(12, dtype))
    slots = torch.tensor([0, 13, 19])
    write_slots(pages, slots, x, None)
    found = read_pages(pages, None)
    written = found[slots // 5, :, slots % 5]
    torch.testing.assert_close(written, x, rtol=2**-4, atol=x.abs().max().item() / 254 if dtype == torch.int8 else 1e-2)
    assert found.count_nonzero() == written.count_nonzero()


def test_records_of_int8_pages_hold_their_scales() -> None:
    pages, _ = ReferenceOps().allocate_kv(2, 6, 3, 8, torch.int8, CPU)
    codes, scales = split_record(pages)
    assert (codes.shape, scales.shape, scales.dtype) == ((2, 3, 6, 8), (2, 3, 6), torch.float32)
    codes.fill_(3)
    scales.copy_(torch.arange(36).view(2, 3, 6))
    copy = torch.empty_like(pages)
    copy[0] = pages[1]  # a page is copied by whoever knows nothing of scales
    assert torch.equal(read_pages(copy, None)[0], read_pages(pages, None)[1])
    with pytest.raises(ValueError, match="multiple of 4"):
        ReferenceOps().allocate_kv(2, 6, 3, 6, torch.int8, CPU)


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_attention_is_that_over_the_dequantised_values(dtype: torch.dtype) -> None:
    shape, ops = Shape(6, 2, 40, 7), ReferenceOps()
    world = World(ops, shape, crowd(4))
    expected = World(ops, shape, crowd(4))
    scale_2K = torch.tensor([[0.5, 2.0], [1.5, 0.25]]) if dtype == FP8 else None
    world.step()
    pages, floats = ops.allocate_kv(len(world.k), 7, 2, 40, dtype, CPU), list[Tensor]()
    slots = torch.arange(len(world.k) * 7)
    for index, (pool, into) in enumerate(zip((world.k, world.v), pages, strict=True)):
        scale_K = None if scale_2K is None else scale_2K[index]
        write_slots(into, slots, pool.transpose(1, 2).flatten(0, 1), scale_K)
        floats.append(read_pages(into, scale_K))
    rows, q = world.rows(list(range(len(world.pieces)))), torch.randn(sum(p.num_rows for p in world.pieces), 6, 40)
    actual = ops.paged_attention(q, pages[0], pages[1], rows, 0.2, 9, kv_scale_2K=scale_2K)
    want = expected.ops.paged_attention(q, floats[0], floats[1], rows, 0.2, 9)
    torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-5)
    assert not actual.isnan().any(), "what nobody wrote is not read"


def test_moves_take_the_scales_along() -> None:
    ops, x = ReferenceOps(), rows_of(12, 2, 8)
    k, v = ops.allocate_kv(3, 4, 2, 8, torch.int8, CPU)
    for pages in (k, v):
        write_slots(pages, torch.arange(12), x, None)
    before = read_pages(k, None).transpose(1, 2).flatten(0, 1)
    ops.move_kv(k, v, torch.tensor([9, 3]), torch.tensor([2, 9]))
    for pages in (k, v):
        after = read_pages(pages, None).transpose(1, 2).flatten(0, 1)
        assert torch.equal(after[[2, 9]], before[[9, 3]])
        assert torch.equal(after[[0, 1, *range(3, 9), 10, 11]], before[[0, 1, *range(3, 9), 10, 11]])


def test_scales_that_pages_do_not_take_are_refused() -> None:
    ops = ReferenceOps()
    world = World(ops, Shape(), [Piece(4, 1)])
    q, rows = torch.zeros(1, 4, 64), world.rows([0])
    for scale in (torch.ones(2, 2), torch.ones(2, 3), torch.ones(2, 2).half()):
        pages = world.k if scale.shape == (2, 2) and scale.dtype == torch.float32 else world.k.to(FP8)
        with pytest.raises(ValueError, match="only fp8 pages take one"):
            ops.paged_attention(q, pages, pages, rows, 1.0, kv_scale_2K=scale)


@pytest.mark.parametrize(
    ("form", "what"),
    [
        (AttentionForm(softcap=3.0), "a logit softcap"),
        (AttentionForm(sinks=4), "sink keys"),
        (AttentionForm(sink_logits_Q=torch.zeros(4)), "sink logits"),
    ],
)
def test_the_compiled_kernels_refuse_what_they_do_not_compute(form: AttentionForm, what: str) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that the compiled kernels refuse other attention")
    world = World(CpuOps(num_threads=1), Shape(), [Piece(4, 1)])
    with pytest.raises(ValueError, match=f"no attention with {what}"):
        world.ops.paged_attention(torch.zeros(1, 4, 64), world.k, world.v, world.rows([0]), 1.0, 8, form)
    assert dataclasses.replace(form, softcap=0.0, sinks=0, sink_logits_Q=None).is_plain

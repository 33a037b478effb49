"""Copy single KV slots, scales included, in the order of a list; a slot that is both source and destination is read as
it was left."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_format import FP8, head_dim_of, scale_pointers
from kernels.triton.tiles import padded_dim


@triton.jit(do_not_specialize=["num_moves"])
def _move(
    k_pages,
    v_pages,
    k_scale,  # the same memory as float32; not read without TOKEN_SCALE
    v_scale,
    sources,
    targets,
    num_moves,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAD: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
):
    """Grid (K, 2): one head of K or of V per program, so that the order within it is a program's own."""
    head = tl.program_id(0)
    d = tl.arange(0, DP)
    pages = k_pages if tl.program_id(1) == 0 else v_pages
    scales = k_scale if tl.program_id(1) == 0 else v_scale
    for move in tl.range(0, num_moves, num_stages=1):
        source = tl.load(sources + move)
        target = tl.load(targets + move)
        from_record = source // PAGE * K + head
        to_record = target // PAGE * K + head
        source_at = from_record * (PAGE * (D + PAD)) + source % PAGE * D + d
        target_at = to_record * (PAGE * (D + PAD)) + target % PAGE * D + d
        tl.store(pages + target_at, tl.load(pages + source_at, mask=d < D, other=0), mask=d < D)
        if TOKEN_SCALE:
            scale_at = PAGE * D // 4 + source % PAGE
            scale = tl.load(scales + from_record * (PAGE * (D + PAD) // 4) + scale_at)
            tl.store(scales + to_record * (PAGE * (D + PAD) // 4) + PAGE * D // 4 + target % PAGE, scale)
        tl.debug_barrier()  # the next move may read what other threads of this one wrote


def move_kv(k_pages: Tensor, v_pages: Tensor, from_slots_M: Tensor, to_slots_M: Tensor) -> None:
    """`Ops.move_kv`."""
    if len(from_slots_M) != len(to_slots_M):
        raise ValueError(f"{len(from_slots_M)} slots cannot move to {len(to_slots_M)}")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous, as allocate_kv makes them")
    num_kv, page_size, head_dim = *k_pages.shape[1:3], head_dim_of(k_pages)
    is_fp8 = k_pages.dtype == FP8
    codes = (k_pages.view(torch.uint8), v_pages.view(torch.uint8)) if is_fp8 else (k_pages, v_pages)
    if len(from_slots_M):
        _move[(num_kv, 2)](
            *codes, *scale_pointers(*codes, None), from_slots_M.contiguous(), to_slots_M.contiguous(),
            len(from_slots_M),
            K=num_kv, PAGE=page_size, D=head_dim, DP=padded_dim(head_dim), PAD=k_pages.shape[3] - head_dim,
            TOKEN_SCALE=k_pages.dtype == torch.int8, num_warps=1,
        )  # fmt: skip

"""Copy single KV slots in the order of a list; a slot that is both source and destination is read as it was left."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.tiles import padded_dim


@triton.jit(do_not_specialize=["num_moves"])
def _move(
    k_pages,
    v_pages,
    sources,
    targets,
    num_moves,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Grid (K, 2): one head of K or of V per program, so that the order within it is a program's own."""
    head = tl.program_id(0)
    d = tl.arange(0, DP)
    for move in tl.range(0, num_moves, num_stages=1):
        source = tl.load(sources + move)
        target = tl.load(targets + move)
        source_at = ((source // PAGE * K + head) * PAGE + source % PAGE) * D + d
        target_at = ((target // PAGE * K + head) * PAGE + target % PAGE) * D + d
        if tl.program_id(1) == 0:
            tl.store(k_pages + target_at, tl.load(k_pages + source_at, mask=d < D, other=0.0), mask=d < D)
        else:
            tl.store(v_pages + target_at, tl.load(v_pages + source_at, mask=d < D, other=0.0), mask=d < D)
        tl.debug_barrier()  # the next move may read what other threads of this one wrote


def move_kv(k_pages: Tensor, v_pages: Tensor, from_slots_M: Tensor, to_slots_M: Tensor) -> None:
    """`Ops.move_kv`."""
    if len(from_slots_M) != len(to_slots_M):
        raise ValueError(f"{len(from_slots_M)} slots cannot move to {len(to_slots_M)}")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous, as allocate_kv makes them")
    num_kv, page_size, head_dim = k_pages.shape[1:]
    if len(from_slots_M):
        _move[(num_kv, 2)](
            k_pages, v_pages, from_slots_M.contiguous(), to_slots_M.contiguous(), len(from_slots_M),
            K=num_kv, PAGE=page_size, D=head_dim, DP=padded_dim(head_dim), num_warps=1,
        )  # fmt: skip

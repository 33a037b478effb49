"""A mixture of experts in four launches: sort, gate and up with SiLU, down, weighted sum.

A pair is a row and one of its chosen experts. Pairs are sorted by expert into tiles of BM of one expert each, so that
products read an expert's weight once per tile, and rows through the pairs' index: nothing is gathered. Grids follow
from shapes alone (the most tiles there can be; unused ones return at once) and nothing is read back to the host, so a
step can be captured in a CUDA graph. The sum over a row's choices runs in their order: no atomics.

Legend: T rows, k choices of a row, P = T k pairs, E experts, H hidden, I intermediate size; N outputs and K inputs of a
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import PackedLinear
from kernels.reference import DenseLinear
from kernels.triton.paged import is_interpreted
from kernels.triton.tiles import next_power_of_two

_SORT_BLOCK = 1024
_SUM_BLOCK = 1024
_GROUP = 8
"""Row tiles that walk over the columns together: what they share stays in the L2 cache."""


class ExpertStack(Sequence[DenseLinear]):
    """One projection of all experts as one array; an expert alone is a view of it."""

    def __init__(self, weight_ENK: Tensor) -> None:
        self.weight_ENK = weight_ENK

    def __len__(self) -> int:
        return len(self.weight_ENK)

    @overload
    def __getitem__(self, index: int) -> DenseLinear: ...
    @overload
    def __getitem__(self, index: slice) -> ExpertStack: ...
    def __getitem__(self, index: int | slice) -> DenseLinear | ExpertStack:
        part = self.weight_ENK[index]
        return ExpertStack(part) if isinstance(index, slice) else DenseLinear(part, None)


def pack_experts(num_experts: int, packed_weight: Callable[[int], Tensor]) -> ExpertStack:
    """`Ops.pack_experts`: beside the stack, one expert's own weight is in memory at a time."""
    first_NK = packed_weight(0)
    weight_ENK = first_NK.new_empty((num_experts, *first_NK.shape))
    weight_ENK[0] = first_NK
    del first_NK
    for expert in range(1, num_experts):
        weight_ENK[expert] = packed_weight(expert)
    return ExpertStack(weight_ENK)


@dataclass(frozen=True)
class ExpertTiles:
    """Tile of a grouped product: rows of one expert, outputs (twice, where gate and up go together), inputs."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def expert_tiles(num_pairs: int, num_experts: int, is_gated: bool, itemsize: int) -> ExpertTiles:
    """By rows of an expert, on average: few are bound by the weights' bytes, many by arithmetic (attention.md 3.3)."""
    average = num_pairs / num_experts
    if itemsize == 4:  # exact products use no matrix unit: wider tiles only spill
        return ExpertTiles(16 if average < 32 else 32, 32, 32, 4, 2)
    if average < 32:
        return ExpertTiles(16, 32 if is_gated else 64, 128, 4, 4)
    if average < 512:
        return ExpertTiles(64, 64 if is_gated else 128, 64, 4, 3)
    return ExpertTiles(128, 64 if is_gated else 128, 64, 8, 3)


def max_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """Most tiles that `num_pairs` can fill: each expert that has a pair may leave its last tile almost empty."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // rows


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def sort_pairs(
    experts,  # int64 [P]
    order,  # int32 [tiles, BM]: pairs, tile by tile; num_pairs where there is none. Unused tiles are not written
    tile_expert,  # int32 [tiles]; -1 = unused
    num_pairs,
    num_tiles,
    E: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (E + 1): program e places the pairs of expert e in their order, the last one marks the unused tiles.

    Every program counts all experts' pairs for itself, which is less than a second launch would cost.
    """
    expert = tl.program_id(0)
    counts = tl.zeros([EP], tl.int32)
    for start in tl.range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(experts + pair, mask=pair < num_pairs, other=0).to(tl.int32)
        counts += tl.histogram(chosen, EP, mask=pair < num_pairs)
    each = tl.arange(0, EP)
    tiles = (counts + BM - 1) // BM
    first = tl.sum(tl.where(each < expert, tiles, 0), 0)
    count = tl.sum(tl.where(each == expert, counts, 0), 0)
    end = first + tl.sum(tl.where(each == expert, tiles, 0), 0)
    if expert == E:
        end = num_tiles
    for start in tl.range(first, end, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(tile_expert + tile, tl.where(expert == E, -1, expert), mask=tile < end)
    if expert < E:
        mine = order + first * BM
        left = count + tl.arange(0, BM)
        tl.store(mine + left, num_pairs, mask=left < (end - first) * BM)
        done = 0
        for start in tl.range(0, num_pairs, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            chosen = tl.load(experts + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
            is_mine = (chosen == expert).to(tl.int32)
            tl.store(mine + done + tl.cumsum(is_mine, 0) - 1, pair, mask=is_mine != 0)
            done += tl.sum(is_mine, 0)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def grouped_product(
    x,  # [P // SHARE, K]: row of pair p is p // SHARE
    weights,  # [E, N, K], or [E, 2 N, K] with GATED: gate, then up
    out,  # [P, N]
    order,
    tile_expert,
    num_pairs,
    num_tiles,
    SHARE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[p] = x[p // SHARE] W[expert of p]^T, or silu(gate) * up of the two halves; sums in float32."""
    program = tl.program_id(0)
    group_size = GROUP * tl.cdiv(N, BN)
    group_first = program // group_size * GROUP
    group_rows = tl.minimum(num_tiles - group_first, GROUP)
    tile = group_first + program % group_size % group_rows
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        pair = tl.load(order + tile * BM + tl.arange(0, BM))
        exists = pair < num_pairs
        n = program % group_size // group_rows * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        # What fills a tile's end computes with row 0 and column 0, and is not stored: no mask in the loop.
        row = tl.where(exists, pair, 0) // SHARE
        x_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
        if GATED:
            w_at = weights + expert.to(tl.int64) * (2 * N * K)
        else:
            w_at = weights + expert.to(tl.int64) * (N * K)
        w_at += tl.where(n < N, n, 0)[None, :] * K + k[:, None]
        acc = tl.zeros([BM, BN], tl.float32)
        if GATED:
            up = tl.zeros([BM, BN], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            if K % BK == 0:
                a = tl.load(x_at + start)
                w = tl.load(w_at + start)
                if GATED:
                    w_up = tl.load(w_at + start + N * K)
            else:
                inside = start + k < K
                a = tl.load(x_at + start, mask=inside[None, :], other=0.0)
                w = tl.load(w_at + start, mask=inside[:, None], other=0.0)
                if GATED:
                    w_up = tl.load(w_at + start + N * K, mask=inside[:, None], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(a, w, acc, input_precision="ieee")
            if GATED:
                if UPCAST:
                    w_up = w_up.to(tl.float32)
                up = tl.dot(a, w_up, up, input_precision="ieee")
        if GATED:
            acc = acc / (1.0 + tl.exp(-acc)) * up
        at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=exists[:, None] & (n < N)[None, :])


@triton.jit
def weighted_sum(y, weights, out, TOP_K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over choices of weights[t, choice] * y[t k + choice], in that order, in float32."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = row * TOP_K + choice
        part = tl.load(y + pair * H + h, mask=h < H, other=0.0).to(tl.float32)
        total += part * tl.load(weights + pair)
    tl.store(out + row * H + h, total.to(out.dtype.element_ty), mask=h < H)


def moe(
    x_TH: Tensor, weights_Tk: Tensor, experts_Tk: Tensor, gate_up: Sequence[PackedLinear], down: Sequence[PackedLinear]
) -> Tensor:
    """Sum over a row's choices of weight * down(silu_mul(gate_up(x))), [T, H] in x's dtype.

    weights_Tk  float32; experts_Tk int64, in [0, E)
    gate_up     [E, 2 I, H] as `pack_experts` makes it; down [E, H, I]. Raises TypeError for anything else
    """
    if not isinstance(gate_up, ExpertStack) or not isinstance(down, ExpertStack):
        raise TypeError("experts of this back end are packed by pack_experts, not one by one")
    if not x_TH.dtype == gate_up.weight_ENK.dtype == down.weight_ENK.dtype:
        raise TypeError(f"x is {x_TH.dtype}, experts are {gate_up.weight_ENK.dtype} and {down.weight_ENK.dtype}")
    (num_rows, hidden), top_k = x_TH.shape, experts_Tk.shape[1]
    num_pairs, num_experts, middle = num_rows * top_k, len(down), down.weight_ENK.shape[2]
    out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return out_TH
    first, second = (expert_tiles(num_pairs, num_experts, gated, x_TH.element_size()) for gated in (True, False))
    num_tiles = max_tiles(num_pairs, num_experts, first.rows)
    order = torch.empty((num_tiles, first.rows), dtype=torch.int32, device=x_TH.device)
    tile_expert = torch.empty(num_tiles, dtype=torch.int32, device=x_TH.device)
    sort_pairs[(num_experts + 1,)](
        experts_Tk.contiguous(), order, tile_expert, num_pairs, num_tiles,
        E=num_experts, EP=next_power_of_two(num_experts), BM=first.rows, BLOCK=_SORT_BLOCK, num_warps=4,
    )  # fmt: skip

    def product(x: Tensor, stack: ExpertStack, num_out: int, share: int, tiles: ExpertTiles) -> Tensor:
        y_PN = torch.empty((num_pairs, num_out), dtype=x.dtype, device=x.device)
        grouped_product[(num_tiles * triton.cdiv(num_out, tiles.columns),)](
            x.contiguous(), stack.weight_ENK, y_PN, order, tile_expert, num_pairs, num_tiles,
            SHARE=share, N=num_out, K=x.shape[1], GATED=tiles is first, BM=tiles.rows, BN=tiles.columns,
            BK=tiles.depth, GROUP=_GROUP, STAGES=tiles.num_stages,
            UPCAST=is_interpreted() and x.dtype == torch.bfloat16,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        return y_PN

    y_PH = product(product(x_TH, gate_up, middle, top_k, first), down, hidden, 1, second)
    weighted_sum[(num_rows, triton.cdiv(hidden, _SUM_BLOCK))](
        y_PH, weights_Tk.contiguous(), out_TH, TOP_K=top_k, H=hidden, BLOCK=_SUM_BLOCK, num_warps=4
    )
    return out_TH

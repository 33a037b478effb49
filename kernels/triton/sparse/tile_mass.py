"""Block-sparse prefill: what mass a query tile gives to each key tile, and the fewest tiles that hold a share of it.

`tile_mass` scores groups of rows against groups of keys along their antidiagonals; pooled tiles are groups of one. Two
passes over the keys, the first for the softmax's sum: 2 / stride of the products of dense attention, and no score
leaves the chip. Masses are integers, so `keep` is exact: it bisects the bits of the least mass that is kept.
`kernels/sparse_prefill.py` and `kernels/sparse_keep.py` are the twins.

Legend: T rows of a chunk, Q query heads, K kv heads, G = Q / K, D head size, QT / KT query / key tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sparse_keep import MASS_ONE, mass_target
from kernels.triton.paged import is_interpreted
from kernels.triton.tiles import next_power_of_two, padded_dim

_BLOCK = 1024


@triton.jit
def _antidiagonal(
    q_at, k_pages, table, block, num_groups, live, limit, head, scale, Q: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr, RM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of the rows' groups against the BN key groups from `block` on, in units of log2, -inf where not seen."""
    n = block + tl.arange(0, BN)
    d = tl.arange(0, DP)
    exists = n < num_groups
    key = n * STRIDE
    page = tl.load(table + key // PAGE, mask=exists, other=0)  # a group lies in one page
    k_at = k_pages + ((page.to(tl.int64) * K + head) * PAGE + key % PAGE) * D
    scores = tl.zeros([RM, BN], tl.float32)
    for phase in tl.range(0, STRIDE):
        query = tl.load(
            q_at[:, None] + (STRIDE - 1 - phase) * (Q * D) + d[None, :],
            mask=live[:, None] & (d < D)[None, :],
            other=0.0,
        )
        keys = tl.load(k_at[None, :] + phase * D + d[:, None], mask=exists[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
            keys = keys.to(tl.float32)
        scores = tl.dot(query, keys, scores, input_precision="ieee")
    return tl.where(n[None, :] < limit[:, None], scores * scale, float("-inf"))


@triton.jit(do_not_specialize=["first", "first_tile", "width"])
def mass_of_tiles(
    q,  # [T, Q, D]
    k_pages,  # [pages, K, PAGE, D]
    table,  # int32: pages of the sequence
    limits,  # int32 [QT * GT]
    counts,  # int32 [QT]
    mass,  # int32 [K, QT, width]
    scale,  # softmax scale * log2(e) / STRIDE
    first,  # position of row 0
    first_tile,  # tile of row 0
    width,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GT: tl.constexpr,  # groups of a tile
    RM: tl.constexpr,
    BN: tl.constexpr,
    ONE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (QT, K)."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    m = tl.arange(0, RM)
    limit = tl.load(limits + tile * GT + m // G, mask=m < GT * G, other=0)
    live = limit > 0
    row = ((first_tile + tile) * GT + m // G) * STRIDE - first
    q_at = q + (row.to(tl.int64) * (K * G) + head * G + m % G) * D
    num_groups = tl.max(limit, 0)
    best = tl.full([RM], float("-inf"), tl.float32)
    total = tl.zeros([RM], tl.float32)
    for block in tl.range(0, num_groups, BN):
        scores = _antidiagonal(
            q_at, k_pages, table, block, num_groups, live, limit, head, scale, K * G, K, D, DP, PAGE, STRIDE, RM, BN,
            UPCAST,
        )  # fmt: skip
        new_best = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        total = total * tl.math.exp2(best - shift) + tl.sum(tl.math.exp2(scores - shift[:, None]), 1)
        best = new_best
    shift = tl.where(best == float("-inf"), 0.0, best)
    num_live = tl.maximum(tl.sum(live.to(tl.int32), 0), 1).to(tl.float32)
    weight = 1.0 / (tl.where(total == 0.0, 1.0, total) * num_live)
    num_tiles = tl.load(counts + tile)
    out = mass + (head * tl.num_programs(0) + tile).to(tl.int64) * width
    for block in tl.range(0, num_tiles * GT, BN):
        scores = _antidiagonal(
            q_at, k_pages, table, block, num_groups, live, limit, head, scale, K * G, K, D, DP, PAGE, STRIDE, RM, BN,
            UPCAST,
        )  # fmt: skip
        share = tl.sum(tl.math.exp2(scores - shift[:, None]) * weight[:, None], 0)
        share = tl.sum(tl.reshape(share, [BN // GT, GT]), 1)
        at = block // GT + tl.arange(0, BN // GT)
        tl.store(out + at, tl.minimum(tl.floor(share * ONE), ONE).to(tl.int32), mask=at < num_tiles)


@triton.jit
def _mass_from(mass, count, least, BLOCK: tl.constexpr):
    """Mass of the tiles that have at least `least` each; int64, or a threshold above all of it could wrap."""
    total = tl.full([], 0, tl.int64)
    for block in tl.range(0, count, BLOCK):
        i = block + tl.arange(0, BLOCK)
        value = tl.load(mass + i, mask=i < count, other=0)
        total += tl.sum(tl.where((i < count) & (value >= least), value, 0).to(tl.int64), 0)
    return total


@triton.jit(do_not_specialize=["width", "target"])
def keep(
    mass,  # int32 [K, QT, width]
    counts,  # int32 [QT]
    forced,  # int32 [K, QT, 2]
    tiles,  # int32 [K, QT, width]
    lengths,  # int32 [K, QT]
    width,
    target,
    BLOCK: tl.constexpr,
):
    """Grid (QT, K)."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = (head * tl.num_programs(0) + tile).to(tl.int64)
    count = tl.load(counts + tile)
    mass += row * width
    least = 0  # the greatest integer such that tiles with at least that mass hold the share; 0 if they never do
    for bit in tl.range(0, 31):
        candidate = least | (1 << (30 - bit))
        least = tl.where(_mass_from(mass, count, candidate, BLOCK) >= target, candidate, least)
    missing = target - _mass_from(mass, count, least + 1, BLOCK)
    # Of tiles that equal it as few as are needed, the lowest index first; of those without mass all.
    ties = tl.where(least > 0, (missing + least - 1) // tl.maximum(least, 1), 1 << 30).to(tl.int32)
    first_forced = tl.load(forced + row * 2)
    second_forced = tl.load(forced + row * 2 + 1)
    kept = 0
    tied = 0
    for block in tl.range(0, count, BLOCK):
        i = block + tl.arange(0, BLOCK)
        value = tl.load(mass + i, mask=i < count, other=0)
        equal = (i < count) & (value == least)
        rank = tied + tl.cumsum(equal.to(tl.int32), 0) - 1
        chosen = (value > least) | (equal & (rank < ties)) | (i == first_forced) | (i == second_forced)
        chosen = chosen & (i < count)
        place = kept + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(tiles + row * width + place, i, mask=chosen)
        kept += tl.sum(chosen.to(tl.int32), 0)
        tied += tl.sum(equal.to(tl.int32), 0)
    tl.store(lengths + row, kept)


def tile_mass(
    q_TQD: Tensor, k_pages: Tensor, table_M: Tensor, limits: Tensor, counts: Tensor, first: int, stride: int,
    group_tile: int, scale: float, width: int,
) -> Tensor:  # fmt: skip
    """`sparse_prefill.tile_mass` of keys in pages, int32 [K, QT, width]; not written from `counts` on.

    stride and the page size must divide one into the other: a group of keys lies in one page.
    """
    num_kv, page_size, head_dim = k_pages.shape[1:]
    if page_size % stride or group_tile > _key_groups(group_tile):
        raise ValueError(f"pages of {page_size} keys do not hold whole groups of {stride}")
    group = q_TQD.shape[1] // num_kv
    mass = torch.empty((num_kv, len(counts), width), dtype=torch.int32, device=q_TQD.device)
    mass_of_tiles[(len(counts), num_kv)](
        q_TQD, k_pages, table_M, limits, counts, mass, scale * math.log2(math.e) / stride, first,
        first // (stride * group_tile), width,
        K=num_kv, G=group, D=head_dim, DP=padded_dim(head_dim), PAGE=page_size, STRIDE=stride, GT=group_tile,
        RM=max(16, next_power_of_two(group * group_tile)), BN=_key_groups(group_tile), ONE=MASS_ONE,
        UPCAST=is_interpreted() and q_TQD.dtype == torch.bfloat16, num_warps=4,
    )  # fmt: skip
    return mass


def _key_groups(group_tile: int) -> int:
    return max(64, group_tile)


def keep_tiles(mass_KQT: Tensor, counts: Tensor, forced: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """`sparse_prefill.keep_tiles` as lists: tiles int32 [K, QT, width], ascending, and their lengths int32 [K, QT]."""
    num_kv, num_query_tiles, width = mass_KQT.shape
    tiles = torch.empty_like(mass_KQT)
    lengths = torch.empty((num_kv, num_query_tiles), dtype=torch.int32, device=mass_KQT.device)
    keep[(num_query_tiles, num_kv)](
        mass_KQT, counts, forced, tiles, lengths, width, mass_target(threshold), BLOCK=_BLOCK, num_warps=4
    )
    return tiles, lengths

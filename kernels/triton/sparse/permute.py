"""Permuted block-sparse prefill: which keys the last rows find important, and copies of K and V in that order.

Importance is a column sum of a softmax that is never stored: one pass over the keys for each row's log-sum-exp, one for
the sums. No atomics, so the same order in every run. `kernels/sparse_prefill.py` is the twin.

Legend: R probe rows, Q query heads, K kv heads, G = Q / K, D head size, N keys; packed row = (row, head of a group).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.paged import is_interpreted
from kernels.triton.tiles import next_power_of_two, padded_dim

_ROWS = 64
_KEYS = 64
_SPLITS = 8


@triton.jit
def _scores(
    query, k_pages, page, tile, num_keys, head, scale, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale q k^T of the keys [tile, tile + BN), whose pages are given; -inf past the last key."""
    n = tile + tl.arange(0, BN)
    d = tl.arange(0, DP)
    at = ((page.to(tl.int64) * K + head) * PAGE + n % PAGE) * D
    key = tl.load(k_pages + at[None, :] + d[:, None], mask=(n < num_keys)[None, :] & (d < D)[:, None], other=0.0)
    if UPCAST:
        key = key.to(tl.float32)
    scores = tl.dot(query, key, input_precision="ieee") * scale
    return tl.where((n < num_keys)[None, :], scores, float("-inf"))


@triton.jit
def _packed_queries(
    q, first, num_rows, head, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    m = first + tl.arange(0, BM)
    d = tl.arange(0, DP)
    at = ((m // G).to(tl.int64) * (K * G) + head * G + m % G) * D
    query = tl.load(q + at[:, None] + d[None, :], mask=(m < num_rows)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    return query


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def probe_lse(
    q,  # [R, Q, D]
    k_pages,  # [pages, K, PAGE, D]
    table,  # int32: pages of the sequence
    lse,  # float32 [K, SPLITS, num_rows], base 2; num_rows = R G
    scale,  # softmax scale * log2(e)
    num_rows,
    num_keys,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (row tiles, K, SPLITS)."""
    first = tl.program_id(0) * BM
    head = tl.program_id(1)
    split = tl.program_id(2)
    query = _packed_queries(q, first, num_rows, head, K, G, D, DP, BM, UPCAST)
    part = tl.cdiv(tl.cdiv(num_keys, BN), tl.num_programs(2)) * BN
    end = tl.minimum(split * part + part, num_keys)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    n = tl.arange(0, BN)
    page = tl.load(table + (split * part + n) // PAGE, mask=split * part + n < end, other=0)
    for tile in tl.range(split * part, end, BN):
        following = tile + BN + n  # one tile ahead, as in attention
        next_page = tl.load(table + following // PAGE, mask=following < end, other=0)
        scores = _scores(query, k_pages, page, tile, num_keys, head, scale, K, D, DP, PAGE, BN, UPCAST)
        new_best = tl.maximum(best, tl.max(scores, 1))
        total = total * tl.math.exp2(best - new_best) + tl.sum(tl.math.exp2(scores - new_best[:, None]), 1)
        best = new_best
        page = next_page
    m = first + tl.arange(0, BM)
    found = tl.where(total == 0.0, float("-inf"), best + tl.math.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse + (head * tl.num_programs(2) + split).to(tl.int64) * num_rows + m, found, mask=m < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def probe_mass(
    q,
    k_pages,
    table,
    lse,  # float32 [K, SPLITS, num_rows]
    importance,  # float32 [K, num_keys]
    scale,
    num_rows,
    num_keys,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (key tiles, K)."""
    tile = tl.program_id(0) * BN
    head = tl.program_id(1)
    s = tl.arange(0, SPLITS)[:, None]
    n = tile + tl.arange(0, BN)
    page = tl.load(table + n // PAGE, mask=n < num_keys, other=0)
    share = tl.zeros([BN], tl.float32)
    for first in tl.range(0, num_rows, BM):
        m = first + tl.arange(0, BM)
        at = lse + (head * SPLITS + s).to(tl.int64) * num_rows + m[None, :]
        parts = tl.load(at, mask=(m < num_rows)[None, :], other=0.0)
        top = tl.max(parts, 0)
        whole = top + tl.math.log2(tl.sum(tl.math.exp2(parts - top[None, :]), 0))
        query = _packed_queries(q, first, num_rows, head, K, G, D, DP, BM, UPCAST)
        scores = _scores(query, k_pages, page, tile, num_keys, head, scale, K, D, DP, PAGE, BN, UPCAST)
        weights = tl.math.exp2(scores - whole[:, None])
        share += tl.sum(tl.where((m < num_rows)[:, None], weights, 0.0), 0)
    tl.store(importance + head.to(tl.int64) * num_keys + n, share / num_rows, mask=n < num_keys)


@triton.jit(do_not_specialize=["num_keys"])
def rank_keys(
    importance,  # float32 [K, num_keys]
    order,  # int32 [K, num_keys]: old index of each place
    num_keys,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (segments, K, SEGMENT / BLOCK). A key's place is the number of keys that come before it."""
    start = tl.program_id(0) * SEGMENT
    mine = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(1).to(tl.int64) * num_keys + start
    value = tl.load(importance + at + mine)[:, None]
    place = tl.zeros([BLOCK], tl.int32)
    for other in tl.range(0, SEGMENT, BLOCK):
        index = other + tl.arange(0, BLOCK)
        rival = tl.load(importance + at + index)[None, :]
        before = (rival > value) | ((rival == value) & (index[None, :] < mine[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order + at + place, start + mine)


@triton.jit(do_not_specialize=["first", "num_keys", "stride"])
def gather_keys(
    k_pages,  # [pages, K, PAGE, D]
    v_pages,
    table,  # int32: pages of the sequence
    order,  # int32 [K, num_keys]: what stands at each place, from `first` on; not read without ORDER
    k_out,  # [K, stride, D]
    v_out,
    first,
    num_keys,
    stride,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Grid (key tiles, K)."""
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    exists = place < num_keys
    key = first + place
    if ORDER:
        key = tl.load(order + head * num_keys + place, mask=exists, other=0)
    page = tl.load(table + key // PAGE, mask=exists, other=0).to(tl.int64)
    source = ((page * K + head) * PAGE + key % PAGE)[:, None] * D + d[None, :]
    target = (head * stride + place)[:, None] * D + d[None, :]
    mask = exists[:, None] & (d < D)[None, :]
    tl.store(k_out + target, tl.load(k_pages + source, mask=mask, other=0.0), mask=mask)
    tl.store(v_out + target, tl.load(v_pages + source, mask=mask, other=0.0), mask=mask)


def importance(q_RQD: Tensor, k_pages: Tensor, table_M: Tensor, num_keys: int, scale: float) -> Tensor:
    """`sparse_prefill.importance` of the first `num_keys` keys of a sequence in pages, float32 [K, num_keys]."""
    num_kv, page_size, head_dim = k_pages.shape[1:]
    group = q_RQD.shape[1] // num_kv
    num_rows = len(q_RQD) * group
    lse = torch.empty((num_kv, _SPLITS, num_rows), dtype=torch.float32, device=q_RQD.device)
    found = torch.empty((num_kv, num_keys), dtype=torch.float32, device=q_RQD.device)
    base_2 = scale * math.log2(math.e)
    sizes = {"K": num_kv, "G": group, "D": head_dim, "DP": padded_dim(head_dim), "PAGE": page_size}
    sizes |= {"BM": _ROWS, "BN": _KEYS, "UPCAST": is_interpreted() and q_RQD.dtype == torch.bfloat16}
    probe_lse[(triton.cdiv(num_rows, _ROWS), num_kv, _SPLITS)](
        q_RQD, k_pages, table_M, lse, base_2, num_rows, num_keys, **sizes, num_warps=4
    )
    probe_mass[(triton.cdiv(num_keys, _KEYS), num_kv)](
        q_RQD, k_pages, table_M, lse, found, base_2, num_rows, num_keys, **sizes, SPLITS=_SPLITS, num_warps=4
    )
    return found


def segment_order(importance_KN: Tensor, segment: int) -> Tensor:
    """`sparse_prefill.segment_order`, int32 [K, N]."""
    num_kv, num_keys = importance_KN.shape
    order = torch.empty((num_kv, num_keys), dtype=torch.int32, device=importance_KN.device)
    block = min(64, segment)
    rank_keys[(num_keys // segment, num_kv, segment // block)](
        importance_KN, order, num_keys, SEGMENT=segment, BLOCK=block, num_warps=4
    )
    return order


def copy_keys(
    k_pages: Tensor, v_pages: Tensor, table_M: Tensor, order_KN: Tensor | None, first: int, num_keys: int,
    k_KND: Tensor, v_KND: Tensor,
) -> None:  # fmt: skip
    """K and V of keys of a sequence as dense rows: in the given order, or from `first` on as they come.

    k_KND, v_KND  [K, at least num_keys, D], of the pages' dtype; what is behind the keys is left as it was
    """
    num_kv, page_size, head_dim = k_pages.shape[1:]
    gather_keys[(triton.cdiv(num_keys, _KEYS), num_kv)](
        k_pages, v_pages, table_M, table_M if order_KN is None else order_KN, k_KND, v_KND, first, num_keys,
        k_KND.shape[1], K=num_kv, D=head_dim, DP=next_power_of_two(head_dim), PAGE=page_size, BN=_KEYS,
        ORDER=order_KN is not None, num_warps=4,
    )  # fmt: skip

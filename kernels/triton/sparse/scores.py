"""Scores that keys and pages are ranked by: float16, one for a kv head's whole group of query heads.

`key_scores` streams what stands for each key, its label of a few channels or the key itself; `page_scores` the bounds
of sub-pages, of which a page has the best; `page_maxima` gives a page the best score of its keys. A group's score is
the highest of its heads': lists are of kv heads, or a group would read up to G lists. float16 is what the ranking needs
and an eighth of what float32 scores of every query head would take (`attention.md` 7, mistakes 7 and 8). Rows that read
all their keys are not scored.

Legend: R sparse rows, Q query heads, K kv heads, G = Q / K, U keys or pages, C channels, M pages of a table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.paged import is_interpreted
from kernels.triton.tiles import next_power_of_two, padded_dim

_ELEMENTWISE_CHANNELS = 16
"""Up to so many channels are multiplied and summed: a matrix unit would be fed padding."""


@triton.jit
def store_scores(scores, at, best, scale, mask):
    value = tl.minimum(tl.maximum(best * scale, -65504.0), 65504.0)
    tl.store(scores + at, value.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["table_stride", "width"])
def key_scores(
    q,  # [R, Q, D]
    keys,  # [pages, K, PAGE, C]: labels, or keys themselves with C = D
    channels,  # int32 [K, C]; not read without CHANNELS
    page_table,  # int32 [N, table_stride]
    row_seq,  # int32 [R]
    row_visible,  # int32 [R]
    budgets,  # int32 [R], in keys
    scores,  # float16 [R, K, width]
    scale,
    table_stride,
    width,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    CHANNELS: tl.constexpr,
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (R, K, splits)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    visible = tl.load(row_visible + row)
    if visible > tl.load(budgets + row):
        part = tl.cdiv(tl.cdiv(visible, BN), tl.num_programs(2)) * BN
        start = tl.program_id(2) * part
        end = tl.minimum(start + part, visible)
        n = tl.arange(0, BN)
        c = tl.arange(0, CP)
        channel = c
        if CHANNELS:
            channel = tl.load(channels + head * C + c, mask=c < C, other=0)
        query = q + ((row * K + head).to(tl.int64) * G) * D + channel
        if DOT:
            g = tl.arange(0, GP)
            heads = tl.load(query[:, None] + g[None, :] * D, mask=(c < C)[:, None] & (g < G)[None, :], other=0.0)
            if UPCAST:
                heads = heads.to(tl.float32)
        out = (row * K + head).to(tl.int64) * width
        table = page_table + tl.load(row_seq + row).to(tl.int64) * table_stride
        page = tl.load(table + (start + n) // PAGE, mask=start + n < end, other=0)
        for tile in tl.range(start, end, BN, num_stages=STAGES):
            # One tile ahead, as in attention: the look-up must not wait for itself.
            following = tile + BN + n
            next_page = tl.load(table + following // PAGE, mask=following < end, other=0)
            at = ((page.to(tl.int64) * K + head) * PAGE + (tile + n) % PAGE) * C
            key = tl.load(keys + at[:, None] + c[None, :], mask=(tile + n < end)[:, None] & (c < C)[None, :], other=0.0)
            if UPCAST:
                key = key.to(tl.float32)
            if DOT:
                products = tl.dot(key, heads, input_precision="ieee")
                best = tl.max(tl.where((g < G)[None, :], products, float("-inf")), 1)
            else:
                best = tl.full([BN], float("-inf"), tl.float32)
                for member in tl.static_range(G):
                    of_head = tl.load(query + member * D, mask=c < C, other=0.0).to(tl.float32)
                    best = tl.maximum(best, tl.sum(key.to(tl.float32) * of_head[None, :], 1))
            store_scores(scores, out + tile + n, best, scale, tile + n < end)
            page = next_page


@triton.jit(do_not_specialize=["table_stride", "width"])
def page_scores(
    q,  # [R, Q, D]
    bounds,  # [pages, K, N, 2, D]: smallest, largest of each sub-page
    page_table,
    row_seq,
    row_visible,
    budgets,
    scores,  # float16 [R, K, width]
    scale,
    table_stride,
    width,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (R, K, splits). Pages from 1 on that end before the last LAST keys begin: all of them are complete.

    A tile is BN pages of NP sub-pages, N padded.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    visible = tl.load(row_visible + row)
    if visible > tl.load(budgets + row):
        late = (visible - LAST) // PAGE
        part = tl.cdiv(tl.cdiv(late, BN), tl.num_programs(2)) * BN
        start = tl.program_id(2) * part
        end = tl.minimum(start + part, late)
        n = tl.arange(0, BN * NP) // NP
        part_of_page = tl.arange(0, BN * NP) % NP
        d = tl.arange(0, DP)
        query = q + ((row * K + head).to(tl.int64) * G) * D + d
        out = (row * K + head).to(tl.int64) * width
        table = page_table + tl.load(row_seq + row).to(tl.int64) * table_stride
        page = tl.load(table + start + n, mask=start + n < end, other=0)
        for tile in tl.range(start, end, BN, num_stages=STAGES):
            following = tile + BN + n
            next_page = tl.load(table + following, mask=following < end, other=0)
            exists = (tile + n >= 1) & (tile + n < end) & (part_of_page < N)
            at = ((page.to(tl.int64) * K + head) * N + part_of_page) * 2 * D
            at = bounds + at[:, None] + d[None, :]
            mask = exists[:, None] & (d < D)[None, :]
            least = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            most = tl.load(at + D, mask=mask, other=0.0).to(tl.float32)
            best = tl.full([BN * NP], float("-inf"), tl.float32)
            for member in tl.static_range(G):
                of_head = tl.load(query + member * D, mask=d < D, other=0.0).to(tl.float32)[None, :]
                best = tl.maximum(best, tl.sum(tl.maximum(of_head * least, of_head * most), 1))
            best = tl.max(tl.reshape(tl.where(exists, best, float("-inf")), [BN, NP]), 1)
            at_page = tile + tl.arange(0, BN)
            store_scores(scores, out + at_page, best, scale, (at_page >= 1) & (at_page < end))
            page = next_page


@triton.jit(do_not_specialize=["key_width", "width"])
def page_maxima(
    key_scores,  # float16 [R, K, key_width]
    row_visible,  # int32 [R]
    budgets,  # int32 [R], in keys
    scores,  # float16 [R, K, width]
    key_width,
    width,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_P: tl.constexpr,
    LAST: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (R, K, blocks of BN pages). The pages that `page_scores` has scores of."""
    row = tl.program_id(0)
    visible = tl.load(row_visible + row)
    if visible > tl.load(budgets + row):
        list_at = (row * K + tl.program_id(1)).to(tl.int64)
        page = tl.program_id(2) * BN + tl.arange(0, BN)
        n = tl.arange(0, PAGE_P)
        exists = (page >= 1) & (page < (visible - LAST) // PAGE)
        at = key_scores + list_at * key_width + page[:, None] * PAGE + n[None, :]
        of_keys = tl.load(at, mask=exists[:, None] & (n < PAGE)[None, :], other=float("-inf"))
        tl.store(scores + list_at * width + page, tl.max(of_keys, 1), mask=exists)


def score_keys(
    q_RQD: Tensor, keys: Tensor, channels_KC: Tensor | None, page_table: Tensor, row_seq_R: Tensor, visible_R: Tensor,
    budgets_R: Tensor, scores_RKU: Tensor, scale: float, splits: int,
) -> None:  # fmt: skip
    """Of rows that see more keys than their budget: max over a group's heads of scale q.k, keys [0, visible).

    keys  labels [P, K, S, C] with `channels_KC`, int32, of the elements of q; or key pages without
    scores_RKU  float16, at least as wide as the longest row
    """
    num_kv, page_size, num_channels = keys.shape[1:]
    group, head_dim = q_RQD.shape[1] // num_kv, q_RQD.shape[2]
    dot = num_channels > _ELEMENTWISE_CHANNELS
    key_scores[(len(q_RQD), num_kv, splits)](
        q_RQD, keys, row_seq_R if channels_KC is None else channels_KC, page_table, row_seq_R, visible_R, budgets_R,
        scores_RKU, scale, page_table.stride(0), scores_RKU.shape[2],
        K=num_kv, G=group, GP=max(16, next_power_of_two(group)), D=head_dim, C=num_channels,
        CP=padded_dim(num_channels) if dot else next_power_of_two(num_channels), PAGE=page_size,
        BN=64 if dot else 128, CHANNELS=channels_KC is not None, DOT=dot,
        UPCAST=is_interpreted() and q_RQD.dtype == torch.bfloat16, STAGES=3, num_warps=4, num_stages=3,
    )  # fmt: skip


def score_pages(
    q_RQD: Tensor, bounds: Tensor, page_table: Tensor, row_seq_R: Tensor, visible_R: Tensor, budgets_R: Tensor,
    scores_RKU: Tensor, scale: float, page_size: int, last: int, splits: int,
) -> None:  # fmt: skip
    """Of rows that see more keys than their budget: an upper bound of scale q.k over each page's keys and the group.

    Source: Tang et al., "Quest" (2024), algorithm 1; departures: a page's best sub-page, a group's highest bound, and
    float16.
    """
    num_kv, parts, head_dim = bounds.shape[1], bounds.shape[2], q_RQD.shape[2]
    padded = next_power_of_two(parts)
    page_scores[(len(q_RQD), num_kv, splits)](
        q_RQD, bounds, page_table, row_seq_R, visible_R, budgets_R, scores_RKU, scale, page_table.stride(0),
        scores_RKU.shape[2], K=num_kv, G=q_RQD.shape[1] // num_kv, D=head_dim, DP=padded_dim(head_dim),
        PAGE=page_size, N=parts, NP=padded, LAST=last, BN=max(1, 32 // padded), STAGES=3, num_warps=4, num_stages=3,
    )  # fmt: skip


def best_of_pages(
    key_scores_RKU: Tensor, visible_R: Tensor, budgets_R: Tensor, page_size: int, most_visible: int, last: int
) -> Tensor:
    """Scores of pages, float16, by those of their keys: of each full page that ends before the last `last` keys begin,
    but the first, the highest."""
    num_rows, num_kv, key_width = key_scores_RKU.shape
    num_pages, padded = -(-most_visible // page_size), next_power_of_two(page_size)
    at_once = max(1, 1024 // padded)
    scores = torch.empty((num_rows, num_kv, num_pages), dtype=torch.float16, device=key_scores_RKU.device)
    page_maxima[(num_rows, num_kv, -(-num_pages // at_once))](
        key_scores_RKU, visible_R, budgets_R, scores, key_width, num_pages,
        K=num_kv, PAGE=page_size, PAGE_P=padded, LAST=last, BN=at_once, num_warps=4,
    )  # fmt: skip
    return scores

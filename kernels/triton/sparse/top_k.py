"""The k best of many float16 scores, in ascending order of index, where they lie: two radix passes and a compaction.

A score is 16 bits, made sortable as an integer: a histogram of its high byte finds the bin of the k-th best, one of
the low byte inside that bin its value; the last pass writes all above it, and of its equals the ones of lowest index.
A long row is cut among programs that leave histograms, not counters, behind, so no sum depends on who came first. Three
reads of two bytes a score. `kernels/sparse_keep.py` is the twin, integer for integer.

Legend: R rows, K kv heads, U units (keys or pages), B most that are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_SPLITS = 16
_LONG = 16 * _BLOCK
"""Rows that may hold more scores than this are cut among _SPLITS programs; shorter ones take one launch, not three."""


@triton.jit
def _sortable(score):
    bits = score.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    bits = tl.where(bits == 0x8000, 0, bits)
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


@triton.jit
def _histogram(scores, start, end, high, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores of [start, end) have each high byte; with LOW, each low byte among those whose high byte is
    `high`."""
    counts = tl.zeros([256], tl.int32)
    for block in tl.range(start, end, BLOCK):
        i = block + tl.arange(0, BLOCK)
        value = _sortable(tl.load(scores + i, mask=i < end, other=0.0))
        if LOW:
            counts += tl.histogram(value & 0xFF, 256, mask=(i < end) & (value >> 8 == high))
        else:
            counts += tl.histogram(value >> 8, 256, mask=i < end)
    return counts


@triton.jit
def _find_bin(counts, need):
    """The bin that holds the need-th greatest, and how many are in bins above it."""
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    found = (above < need) & (need <= above + counts)
    return tl.sum(tl.where(found, tl.arange(0, 256), 0), 0), tl.sum(tl.where(found, above, 0), 0)


@triton.jit
def _compact(
    scores, table, ids, indices, start, end, count, keep, first, late, threshold, ties, kept, tied, head,
    K: tl.constexpr, UNIT: tl.constexpr, INDICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what is kept of [start, end). Before it `kept` were, and `tied` equalled the threshold, of which `ties`
    are kept in all."""
    for block in tl.range(start, end, BLOCK):
        i = block + tl.arange(0, BLOCK)
        scored = (i >= first) & (i < late) & (i < end)
        value = _sortable(tl.load(scores + i, mask=scored, other=0.0))
        equal = scored & (value == threshold)
        rank = tied + tl.cumsum(equal.to(tl.int32), 0) - 1
        chosen = (scored & (value > threshold)) | (equal & (rank < ties))
        place = first + kept + tl.cumsum(chosen.to(tl.int32), 0) - 1
        place = tl.where(i < first, i, tl.where(i >= late, keep - (count - i), place))
        written = chosen | ((i < end) & ((i < first) | (i >= late)))
        page = tl.load(table + i // UNIT, mask=written, other=0)
        tl.store(ids + place, (page * K + head) * UNIT + i % UNIT, mask=written)
        if INDICES:
            tl.store(indices + place, i, mask=written)
        kept += tl.sum(chosen.to(tl.int32), 0)
        tied += tl.sum(equal.to(tl.int32), 0)


@triton.jit(do_not_specialize=["table_stride", "width", "list_stride", "index_stride"])
def select(
    scores,  # float16 [R, K, width]
    page_table,  # int32 [N, table_stride]
    row_seq,  # int32 [R]
    row_visible,  # int32 [R], in keys
    budgets,  # int32 [R], in keys
    histograms,  # int32 [2, R, K, SPLITS, 256]; not used in pass 3
    ids,  # int32 [R, K, list_stride]
    indices,  # int32 [R, K, index_stride]; not written without INDICES
    table_stride,
    width,
    list_stride,
    index_stride,
    K: tl.constexpr,
    PAGE: tl.constexpr,  # size of a page where pages are chosen, else 0
    UNIT: tl.constexpr,  # 1 where pages are chosen, else the page size
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    INDICES: tl.constexpr,
    SPLITS: tl.constexpr,
    PASS: tl.constexpr,  # 0 and 1: histograms of the high and the low byte, 2: writes the list; 3: all, with SPLITS = 1
    BLOCK: tl.constexpr,
):
    """Grid (R, K, SPLITS)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    visible = tl.load(row_visible + row)
    budget = tl.load(budgets + row)
    if PAGE > 0:
        count = tl.cdiv(visible, PAGE)
        keep = budget // PAGE
        first = tl.minimum(FIRST, count)
        late = (visible - LAST) // PAGE
    else:
        count = visible
        keep = budget
        first = FIRST
        late = visible - LAST
    if visible <= budget:  # all of them: nothing is scored, the scores may hold anything
        keep = count
        first = count
        late = count
    need = keep - first - (count - late)
    part = tl.cdiv(tl.cdiv(count, BLOCK), SPLITS) * BLOCK
    start = split * part
    end = tl.minimum(start + part, count)
    list_at = (row * K + head).to(tl.int64)
    scores += list_at * width
    scored_start = tl.maximum(start, first)
    scored_end = tl.minimum(end, late)
    bins = tl.arange(0, 256)
    splits = tl.arange(0, SPLITS)
    of_list = histograms + list_at * (SPLITS * 256)
    of_list_low = of_list + tl.num_programs(0).to(tl.int64) * (K * SPLITS * 256)
    cells = splits[:, None] * 256 + bins[None, :]
    if PASS == 0:
        tl.store(of_list + split * 256 + bins, _histogram(scores, scored_start, scored_end, 0, False, BLOCK))
    else:
        if PASS == 3:
            high_counts = _histogram(scores, scored_start, scored_end, 0, False, BLOCK)
        else:
            each_high = tl.load(of_list + cells)
            high_counts = tl.sum(each_high, 0)
        high, above = _find_bin(high_counts, need)
        if PASS == 1:
            low_counts = _histogram(scores, scored_start, scored_end, high, True, BLOCK)
            tl.store(of_list_low + split * 256 + bins, low_counts)
        else:
            kept = 0
            tied = 0
            if PASS == 3:
                low_counts = _histogram(scores, scored_start, scored_end, high, True, BLOCK)
            else:
                each_low = tl.load(of_list_low + cells)
                low_counts = tl.sum(each_low, 0)
            low, above_low = _find_bin(low_counts, need - above)
            ties = need - above - above_low
            if PASS == 2:  # what the programs before this one keep
                before = (splits < split)[:, None]
                kept = tl.sum(tl.sum(tl.where(before & (bins > high)[None, :], each_high, 0), 1), 0)
                kept += tl.sum(tl.sum(tl.where(before & (bins > low)[None, :], each_low, 0), 1), 0)
                tied = tl.sum(tl.sum(tl.where(before & (bins == low)[None, :], each_low, 0), 1), 0)
                kept += tl.minimum(tied, ties)
            threshold = tl.where(need > 0, high * 256 + low, 1 << 16)
            table = page_table + tl.load(row_seq + row).to(tl.int64) * table_stride
            ids += list_at * list_stride
            indices += list_at * index_stride
            _compact(
                scores, table, ids, indices, start, end, count, keep, first, late, threshold, ties, kept, tied, head,
                K, UNIT, INDICES, BLOCK,
            )  # fmt: skip


def select_top_k(
    scores_RKU: Tensor, page_table: Tensor, row_seq_R: Tensor, visible_R: Tensor, budgets_R: Tensor, ids_RKB: Tensor,
    indices_RKB: Tensor | None, page_size: int, of_pages: bool, first: int, last: int,
) -> None:  # fmt: skip
    """Fill the lists of each row and kv head: physical ids as `sparse_keep.physical_ids` and, if asked, indices.

    visible_R, budgets_R  int32, in keys. A row that sees no more than its budget lists everything
    of_pages   pages are chosen: page 0, those that hold one of the last `last` keys, the best of the others, budget //
               page_size in all. Else keys: the first `first`, the last `last`, the best of the others
    ids_RKB, indices_RKB  int32, wide enough for the longest list; what is behind a list is left as it was
    """
    indices = ids_RKB if indices_RKB is None else indices_RKB
    if not (ids_RKB.is_contiguous() and indices.is_contiguous()):
        raise ValueError("ids and indices must be contiguous")
    num_rows, num_kv, width = scores_RKU.shape
    splits = _SPLITS if width > _LONG else 1
    passes = (0, 1, 2) if splits > 1 else (3,)
    histograms = ids_RKB
    if splits > 1:
        histograms = torch.empty((2, num_rows, num_kv, splits, 256), dtype=torch.int32, device=ids_RKB.device)
    for number in passes:
        select[(num_rows, num_kv, splits)](
            scores_RKU, page_table, row_seq_R, visible_R, budgets_R, histograms, ids_RKB, indices,
            page_table.stride(0), width, ids_RKB.shape[2], indices.shape[2],
            K=num_kv, PAGE=page_size if of_pages else 0, UNIT=1 if of_pages else page_size,
            FIRST=1 if of_pages else first, LAST=last, INDICES=indices_RKB is not None, SPLITS=splits, PASS=number,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip

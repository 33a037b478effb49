"""The plain way to split: a grid of (unit, kv head, segment), every sequence cut into the same number of segments.

A stand-in for what most Triton kernels do, to measure our plan against on any machine. Two settings: `VLLM_LIKE` (tiles
of 16 rows and 32 keys, 16 segments where all spans have one row and none elsewhere, the page looked up in the
iteration that reads it), and `FIXED_SPLIT` (our tile shapes, segments until the grid fills the device). No windows, no
trees. Not used by any back end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.triton.paged import is_interpreted
from kernels.triton.tiles import next_power_of_two, padded_dim


@dataclass(frozen=True)
class Settings:
    """segments: of every sequence where all spans have one row; 0 = as many as fill the device. Else one."""

    decode_rows: int
    prefill_rows: int
    tile_keys: int
    segments: int
    num_warps: int
    num_stages: int


VLLM_LIKE = Settings(decode_rows=16, prefill_rows=16, tile_keys=32, segments=16, num_warps=4, num_stages=3)
FIXED_SPLIT = Settings(decode_rows=16, prefill_rows=128, tile_keys=64, segments=0, num_warps=4, num_stages=3)


class FixedSplit:
    """One step's rows, cut into units of `decode_rows` (or `prefill_rows`) // group query rows."""

    def __init__(self, rows: AttentionRows, q_TQD: Tensor, k_pages: Tensor, settings: Settings) -> None:
        self._rows, self._settings, device = rows, settings, q_TQD.device
        self._group = q_TQD.shape[1] // k_pages.shape[1]
        bounds = rows.span_starts.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        is_decode = max(lengths) == 1
        asked = settings.decode_rows if is_decode else settings.prefill_rows
        self._tile_rows = max(16, asked, next_power_of_two(self._group))
        step = self._tile_rows // self._group
        sequences, visible = rows.row_seq.tolist(), rows.visible.tolist()
        units = [
            (sequences[first], first, min(step, end - first), max(visible[first : min(first + step, end)]))
            for start, end in pairwise(bounds)
            for first in range(start, end, step)
        ]
        self._units = torch.tensor(units, dtype=torch.int32, device=device)
        self._segments = self._choose_segments(len(units) * k_pages.shape[1], device) if is_decode else 1
        parts = (self._segments, *q_TQD.shape[:2])
        self._partial = torch.empty(*parts, q_TQD.shape[2], dtype=torch.float32, device=device)
        self._lse = torch.empty(parts, dtype=torch.float32, device=device)

    def _choose_segments(self, num_units: int, device: torch.device) -> int:
        if self._settings.segments:
            return self._settings.segments
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        return max(1, min(32, -(-2 * sms // num_units)))

    def run(self, q_TQD: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float) -> Tensor:
        """[T, Q, D]."""
        settings, rows = self._settings, self._rows
        num_kv, page = k_pages.shape[1:3]
        num_rows, num_q, head_dim = q_TQD.shape
        out_TQD = torch.empty_like(q_TQD)
        sizes = {"D": head_dim, "DP": padded_dim(head_dim), "SEGMENTS": self._segments}
        is_large = self._tile_rows >= 64
        attend_segment[(len(self._units), num_kv, self._segments)](
            q_TQD, k_pages, v_pages, rows.page_table, rows.visible, self._units, out_TQD, self._partial, self._lse,
            scale * math.log2(math.e), rows.page_table.stride(0), num_rows,
            **sizes, K=num_kv, G=self._group, PAGE=page, BM=self._tile_rows, BN=min(settings.tile_keys, page),
            UPCAST=is_interpreted() and q_TQD.dtype == torch.bfloat16,
            num_warps=8 if is_large else settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        if self._segments > 1:
            merge_segments[(num_rows * num_q,)](
                self._partial, self._lse, out_TQD, num_rows * num_q, **sizes,
                SEGMENTS_P=next_power_of_two(self._segments), num_warps=1,
            )  # fmt: skip
        return out_TQD


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def attend_segment(
    q,  # [T, Q, D]
    k_pages,  # [pages, K, PAGE, D]
    v_pages,
    page_table,  # int32 [N, table_stride]
    row_visible,  # int32 [T]
    units,  # int32 [units, 4]: sequence, first row, number of rows, most keys seen
    out,  # [T, Q, D], written where SEGMENTS is 1
    partial,  # float32 [SEGMENTS, T, Q, D]
    partial_lse,  # float32 [SEGMENTS, T, Q], base 2
    scale,  # softmax scale * log2(e)
    table_stride,
    num_rows,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    fields = units + tl.program_id(0) * 4
    head = tl.program_id(1)
    segment = tl.program_id(2)
    first_row = tl.load(fields + 1)
    hi = tl.load(fields + 3)
    tiles = tl.cdiv(tl.cdiv(hi, BN), SEGMENTS)
    start = segment * tiles * BN
    stop = tl.minimum(start + tiles * BN, hi)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    live = (m // G < tl.load(fields + 2)) & (m < BM // G * G)
    row = first_row + m // G
    at = row.to(tl.int64) * (K * G) + head * G + m % G  # (row, query head)
    live_d = live[:, None] & (d < D)[None, :]
    query = tl.load(q + at[:, None] * D + d[None, :], mask=live_d, other=0.0)
    visible = tl.load(row_visible + row, mask=live, other=0)
    table = page_table + tl.load(fields).to(tl.int64) * table_stride
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    if UPCAST:
        query = query.to(tl.float32)
    for tile in range(start, stop, BN):
        page = tl.load(table + tile // PAGE).to(tl.int64)
        index = tile + n
        present = index < hi
        base = ((page * K + head) * PAGE + tile % PAGE + n) * D
        key = tl.load(k_pages + base[None, :] + d[:, None], mask=present[None, :] & (d < D)[:, None], other=0.0)
        value = tl.load(v_pages + base[:, None] + d[None, :], mask=present[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        scores = tl.where(index[None, :] < visible[:, None], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.math.exp2(scores - shift[:, None])
        decay = tl.math.exp2(best - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
        best = new_best
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SEGMENTS == 1:
        tl.store(out + at[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=live_d)
    else:
        part = segment.to(tl.int64) * num_rows * (K * G) + at
        tl.store(partial + part[:, None] * D + d[None, :], result, mask=live_d)
        lse = tl.where(total == 0.0, float("-inf"), best + tl.math.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(partial_lse + part, lse, mask=live)


@triton.jit(do_not_specialize=["num_pairs"])
def merge_segments(
    partial,  # float32 [SEGMENTS, T * Q, D]
    partial_lse,  # float32 [SEGMENTS, T * Q]
    out,  # [T * Q, D]
    num_pairs,
    D: tl.constexpr,
    DP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENTS_P: tl.constexpr,
):
    """One (row, query head) per program."""
    pair = tl.program_id(0)
    segment = tl.arange(0, SEGMENTS_P)
    d = tl.arange(0, DP)
    at = segment.to(tl.int64) * num_pairs + pair
    lse = tl.load(partial_lse + at, mask=segment < SEGMENTS, other=float("-inf"))
    weights = tl.math.exp2(lse - tl.max(lse, 0))
    # What an empty segment left is 0, but its weight is 0 as well.
    parts = tl.load(
        partial + at[:, None] * D + d[None, :], mask=(segment < SEGMENTS)[:, None] & (d < D)[None, :], other=0.0
    )
    result = tl.sum(weights[:, None] * parts, 0) / tl.sum(weights, 0)
    tl.store(out + pair * D + d, result.to(out.dtype.element_ty), mask=d < D)

"""What `attention.py` left in pieces: cut units (`combine`), rows of several units (`merge_parts`).

Pieces are normalised results beside their log-sum-exp in base 2; merged in the order of their keys. Legend there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.attention import find_unit, log_sum, sum_with_sink


@triton.jit
def _add_pieces(partial_out, partial_lse, place, exists, best, total, acc, d, D: tl.constexpr):
    """Merge some pieces of one packed row into the running maximum, sum and values."""
    lse = tl.load(partial_lse + place, mask=exists, other=float("-inf"))
    part = tl.load(
        partial_out + place.to(tl.int64)[:, None] * D + d[None, :],
        mask=exists[:, None] & (d < D)[None, :],
        other=0.0,
    )
    new_best = tl.maximum(best, tl.max(lse, 0))
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.math.exp2(lse - shift)
    decay = tl.math.exp2(best - shift)
    return new_best, total * decay + tl.sum(weights, 0), acc * decay + tl.sum(weights[:, None] * part, 0)


@triton.jit
def _store_row(out, at, best, total, acc, sink_logit, d, D: tl.constexpr, SINK_LOGITS: tl.constexpr):
    """Write one packed row's result to `out`."""
    if SINK_LOGITS:
        factor, total = sum_with_sink(best, total, tl.load(sink_logit))
        acc *= factor
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + at + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def combine(
    row_list,
    sink_logits,
    header,
    units,
    cum,
    out,  # [T, Q, D]
    partial_out,  # float32 [rows, D]
    partial_lse,  # float32 [rows]
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    LISTED: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Merge the pieces of the unit that boundary number program_id(0) + 1 cuts, if it is the first to cut it.

    Grid (P - 1, 16). A piece's slot is 2 p if the unit starts at or before program p's share, else 2 p + 1.
    """
    budget = tl.load(header)
    head_tiles = tl.load(header + 1)
    boundary = tl.program_id(0) + 1
    x = boundary * budget
    if x < tl.load(header + 2):
        head = x // head_tiles
        unit = find_unit(cum, tl.load(header + 3), x % head_tiles)
        unit_start = head * head_tiles + tl.load(cum + unit)
        unit_end = head * head_tiles + tl.load(cum + unit + 1)
        if (x > unit_start) & (x - budget <= unit_start):
            first = boundary - 1
            num_pieces = (unit_end - 1) // budget - first + 1
            first_row = tl.load(units + unit * 8 + 1)
            num_rows = tl.load(units + unit * 8 + 2)
            part = tl.load(units + unit * 8 + 7)
            d = tl.arange(0, DP)
            piece = tl.arange(0, PIECES)
            for turn in tl.range(0, BM // 16):
                m = tl.program_id(1) + turn * 16
                if (m // G < num_rows) & (m < BM // G * G):
                    best = float("-inf")
                    total = 0.0
                    acc = tl.zeros([DP], tl.float32)
                    for done in tl.range(0, num_pieces, PIECES):
                        program = first + done + piece
                        slot = tl.where(program * budget >= unit_start, 2 * program, 2 * program + 1)
                        best, total, acc = _add_pieces(
                            partial_out, partial_lse, slot * BM + m, done + piece < num_pieces, best, total, acc, d, D
                        )
                    if part < 0:
                        row = first_row + m // G
                        if LISTED:
                            row = tl.load(row_list + row)
                        at = (row.to(tl.int64) * (K * G) + head * G + m % G) * D
                        _store_row(out, at, best, total, acc, sink_logits + head * G + m % G, d, D, SINK_LOGITS)
                    else:
                        place = (part + head * (num_rows * G) + m).to(tl.int64)
                        result = acc / tl.where(total == 0.0, 1.0, total)
                        tl.store(partial_out + place * D + d, result, mask=d < D)
                        tl.store(partial_lse + place, log_sum(best, total))


@triton.jit
def merge_parts(
    rows,  # int32 [R]: rows that several units hold a part of
    starts,  # int32 [R + 1]: where each row's parts begin in `parts`
    parts,  # int32 [E, 2]: place of the row's first head in the part, places of a kv head there
    sink_logits,
    out,  # [T, Q, D]
    partial_out,
    partial_lse,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Grid (R, Q): merge one head's parts of one row in the order of the list, which is that of their keys."""
    index = tl.program_id(0)
    q_head = tl.program_id(1)
    first = tl.load(starts + index)
    stop = tl.load(starts + index + 1)
    d = tl.arange(0, DP)
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([DP], tl.float32)
    for done in tl.range(first, stop, PIECES):
        entry = done + tl.arange(0, PIECES)
        exists = entry < stop
        place = tl.load(parts + 2 * entry, mask=exists, other=0) + q_head % G
        place += q_head // G * tl.load(parts + 2 * entry + 1, mask=exists, other=0)
        best, total, acc = _add_pieces(partial_out, partial_lse, place, exists, best, total, acc, d, D)
    at = (tl.load(rows + index).to(tl.int64) * (K * G) + q_head) * D
    _store_row(out, at, best, total, acc, sink_logits + q_head, d, D, SINK_LOGITS)

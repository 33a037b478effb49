"""Paged attention for any mix of spans: a kernel over the plan's flat tile space, and one that merges what was cut.

Row t sees the keys [low, visible) of its own sequence; from `tree_start` on the bits of its mask say which. Query heads
of one kv head are packed side by side into the rows of a tile. Tiles that every row of a unit sees whole need no mask
and form the inner loop; the rest are edges. All sums are float32; memory that no row sees is not loaded, or as 0.

Legend: T rows, Q query heads, K kv heads, G = Q / K, D head_dim, DP D padded to a power of two, BM / BN rows / keys of
a tile, P programs. Source: online softmax as in Dao, "FlashAttention-2" (2023), 3.1, in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _find_unit(cum, num_units, tile):
    """The unit that tile `tile` of a head belongs to: the last one whose first tile is not behind it."""
    low = 0
    high = num_units - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(cum + middle) <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    return low


@triton.jit
def _load_pages(table, tile_start, lo, hi, PAGE: tl.constexpr, BN: tl.constexpr):
    """Physical page of the tile's keys: one number where a tile lies in one page, else one for each key."""
    if PAGE % BN == 0:
        return tl.load(table + tile_start // PAGE, mask=tile_start < hi, other=0)
    else:
        key = tile_start + tl.arange(0, BN)
        return tl.load(table + key // PAGE, mask=(key >= lo) & (key < hi), other=0)


@triton.jit
def _key_pointers(
    pages, page, tile_start, head, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr
):
    """Address of each key's first element, [BN]. A pool passes 2^31 elements easily: 64 bits from the page on."""
    if PAGE % BN == 0:
        first = pages + ((page.to(tl.int64) * K + head) * PAGE + tile_start % PAGE) * D
        return first + tl.arange(0, BN) * D
    else:
        offset = (tile_start + tl.arange(0, BN)) % PAGE
        return pages + ((page.to(tl.int64) * K + head) * PAGE + offset) * D


@triton.jit
def _online_softmax(scores, v, best, total, acc, MASKED: tl.constexpr):
    """Add one tile to the running maximum, sum and weighted values; a row of -inf leaves them as they are."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    shift = new_best
    if MASKED:  # -inf minus -inf is NaN
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.math.exp2(scores - shift[:, None])
    decay = tl.math.exp2(best - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_best, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def attend(
    q,  # [T, Q, D]
    k_pages,  # [pages, K, PAGE, D]
    v_pages,
    page_table,  # int32 [N, table_stride]
    row_low,  # int32 [T]; not read without WINDOW
    row_visible,  # int32 [T]
    row_tree,  # int32 [T, 2]; these two are not read without TREE
    row_tree_start,  # int32 [T]
    header,  # int32: budget, tiles of a head, tiles, units
    units,  # int32 [units, 8], see plan.Launch
    cum,  # int32 [units + 1]
    out,  # [T, Q, D]
    partial_out,  # float32 [2 P, BM, D]
    partial_lse,  # float32 [2 P, BM], base 2
    scale,  # softmax scale * log2(e)
    table_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    budget = tl.load(header)
    head_tiles = tl.load(header + 1)
    num_units = tl.load(header + 3)
    x = program * budget
    end = tl.minimum(x + budget, tl.load(header + 2))
    head = x // head_tiles
    unit = _find_unit(cum, num_units, x % head_tiles)
    slot = 2 * program  # of the first piece; the next that is cut is the program's last
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    n = tl.arange(0, BN)
    while x < end:
        fields = units + unit * 8
        seq = tl.load(fields)
        first_row = tl.load(fields + 1)
        num_rows = tl.load(fields + 2)
        lo = tl.load(fields + 3)
        hi = tl.load(fields + 6)
        unit_start = head * head_tiles + tl.load(cum + unit)
        unit_end = head * head_tiles + tl.load(cum + unit + 1)
        piece_end = tl.minimum(unit_end, end)
        # The piece's keys, and the part of them that every row sees.
        start = lo // BN * BN + (x - unit_start) * BN
        stop = start + (piece_end - x) * BN
        inner_lo = tl.minimum(tl.maximum(start, tl.load(fields + 4)), stop)
        inner_hi = tl.maximum(tl.minimum(stop, tl.load(fields + 5)), inner_lo)

        live = (m // G < num_rows) & (m < BM // G * G)
        row = first_row + m // G
        at = (row.to(tl.int64) * (K * G) + head * G + m % G) * D
        at = at[:, None] + d[None, :]
        live_d = live[:, None] & (d < D)[None, :]
        query = tl.load(q + at, mask=live_d, other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        best = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DP], tl.float32)
        table = page_table + seq.to(tl.int64) * table_stride

        # The page of the next tile is loaded one tile ahead: with the look-up in the same iteration the compiler keeps
        # one tile in flight instead of STAGES - 1.
        page = _load_pages(table, inner_lo, inner_lo, inner_hi, PAGE, BN)
        for tile in tl.range(inner_lo, inner_hi, BN, num_stages=STAGES):
            next_page = _load_pages(table, tile + BN, inner_lo, inner_hi, PAGE, BN)
            k_at = _key_pointers(k_pages, page, tile, head, K, D, PAGE, BN)[None, :] + d[:, None]
            v_at = _key_pointers(v_pages, page, tile, head, K, D, PAGE, BN)[:, None] + d[None, :]
            if DP == D:
                key = tl.load(k_at)
                value = tl.load(v_at)
            else:
                key = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
                value = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
            if UPCAST:
                key = key.to(tl.float32)
                value = value.to(tl.float32)
            scores = tl.dot(query, key, input_precision="ieee") * scale
            best, total, acc = _online_softmax(scores, value, best, total, acc, False)
            page = next_page

        visible = tl.load(row_visible + row, mask=live, other=0)
        if WINDOW:
            low = tl.load(row_low + row, mask=live, other=0)
        if TREE:
            tree_start = tl.load(row_tree_start + row, mask=live, other=1 << 30)
            word_0 = tl.load(row_tree + 2 * row, mask=live, other=0)
            word_1 = tl.load(row_tree + 2 * row + 1, mask=live, other=0)
        left = (inner_lo - start) // BN
        for edge in tl.range(0, left + (stop - inner_hi) // BN, num_stages=1):
            tile = tl.where(edge < left, start + edge * BN, inner_hi + (edge - left) * BN)
            index = tile + n
            present = (index >= lo) & (index < hi)
            page = _load_pages(table, tile, lo, hi, PAGE, BN)
            k_at = _key_pointers(k_pages, page, tile, head, K, D, PAGE, BN)[None, :] + d[:, None]
            v_at = _key_pointers(v_pages, page, tile, head, K, D, PAGE, BN)[:, None] + d[None, :]
            # What nobody wrote must not be loaded: a weight of 0 times NaN is NaN.
            key = tl.load(k_at, mask=present[None, :] & (d < D)[:, None], other=0.0)
            value = tl.load(v_at, mask=present[:, None] & (d < D)[None, :], other=0.0)
            if UPCAST:
                key = key.to(tl.float32)
                value = value.to(tl.float32)
            seen = index[None, :] < visible[:, None]
            if WINDOW:
                before = index[None, :] >= low[:, None]
            if TREE:
                node = index[None, :] - tree_start[:, None]
                word = tl.where(node < 32, word_0[:, None], word_1[:, None])
                chosen = ((word >> (node & 31)) & 1) != 0
                if WINDOW:
                    seen = seen & tl.where(node < 0, before, chosen)
                else:
                    seen = seen & ((node < 0) | chosen)
            elif WINDOW:
                seen = seen & before
            scores = tl.dot(query, key, input_precision="ieee") * scale
            scores = tl.where(seen, scores, float("-inf"))
            best, total, acc = _online_softmax(scores, value, best, total, acc, True)

        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if (x == unit_start) & (piece_end == unit_end):
            tl.store(out + at, result.to(out.dtype.element_ty), mask=live_d)
        else:
            part = (slot * BM + m)[:, None] * D + d[None, :]
            tl.store(partial_out + part, result, mask=live_d)
            lse = tl.where(total == 0.0, float("-inf"), best + tl.math.log2(tl.where(total == 0.0, 1.0, total)))
            tl.store(partial_lse + slot * BM + m, lse, mask=live)
        x = piece_end
        slot = 2 * program + 1
        last = unit + 1 == num_units
        unit = tl.where(last, 0, unit + 1)
        head = tl.where(last, head + 1, head)


@triton.jit
def combine(
    header,
    units,
    cum,
    out,  # [T, Q, D]
    partial_out,  # float32 [2 P, BM, D]
    partial_lse,  # float32 [2 P, BM]
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
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
        unit = _find_unit(cum, tl.load(header + 3), x % head_tiles)
        unit_start = head * head_tiles + tl.load(cum + unit)
        unit_end = head * head_tiles + tl.load(cum + unit + 1)
        if (x > unit_start) & (x - budget <= unit_start):
            first = boundary - 1
            num_pieces = (unit_end - 1) // budget - first + 1
            first_row = tl.load(units + unit * 8 + 1)
            num_rows = tl.load(units + unit * 8 + 2)
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
                        exists = done + piece < num_pieces
                        slot = tl.where(program * budget >= unit_start, 2 * program, 2 * program + 1)
                        lse = tl.load(partial_lse + slot * BM + m, mask=exists, other=float("-inf"))
                        part = tl.load(
                            partial_out + (slot * BM + m)[:, None] * D + d[None, :],
                            mask=exists[:, None] & (d < D)[None, :],
                            other=0.0,
                        )
                        new_best = tl.maximum(best, tl.max(lse, 0))
                        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
                        weights = tl.math.exp2(lse - shift)
                        decay = tl.math.exp2(best - shift)
                        total = total * decay + tl.sum(weights, 0)
                        acc = acc * decay + tl.sum(weights[:, None] * part, 0)
                        best = new_best
                    result = acc / tl.where(total == 0.0, 1.0, total)
                    at = ((first_row + m // G).to(tl.int64) * (K * G) + head * G + m % G) * D
                    tl.store(out + at + d, result.to(out.dtype.element_ty), mask=d < D)

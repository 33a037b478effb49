"""Paged attention for any mix of spans: a kernel over the plan's flat tile space (`merge.py` joins what was cut).

Row t sees the keys [low, visible) of its own sequence, under a window the first SINKS too; from `tree_start` on the
bits of its mask say which. Query heads of one kv head are packed side by side into the rows of a tile. Tiles that every
row of a unit sees whole need no mask and form the inner loop; the rest are edges. All sums are float32; memory that no
row sees is not loaded, or as 0. Pages are dequantised to the query's dtype: scales of heads are folded into the softmax
scale and the result, scales of tokens (int8) multiply columns of scores and of weights.

Legend: T rows, Q query heads, K kv heads, G = Q / K, D head_dim, DP D padded to a power of two, BM / BN rows / keys of
a tile, P programs, PAD elements of a (page, head) record per slot beside its codes (`kv_format.py`).
Source: online softmax as in Dao, "FlashAttention-2" (2023), 3.1, in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_unit(cum, num_units, tile):
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
def _first_unit(header, cum, program, head_tiles, num_units, is_whole):
    """A program's share of the tile space, [x, end), and where it begins: a head and a unit of it."""
    budget = tl.load(header)
    x = program * budget
    end = tl.minimum(x + budget, tl.load(header + 2))
    head = x // head_tiles
    unit = find_unit(cum, num_units, x % head_tiles)
    # Units that stay whole belong to the program whose share holds their first tile.
    skips = is_whole & (x % head_tiles != tl.load(cum + unit))
    x = tl.where(skips, head * head_tiles + tl.load(cum + unit + 1), x)
    unit = tl.where(skips, unit + 1, unit)
    head = tl.where(unit == num_units, head + 1, head)
    unit = tl.where(unit == num_units, 0, unit)
    return x, end, head, unit


@triton.jit
def _keys_of(lo, first_tile, end_tile, SINKS: tl.constexpr, BN: tl.constexpr):
    """The keys of a unit's tiles [first_tile, end_tile): first sink tile and how many of them, then [start, stop)."""
    # Before the tiles from lo on there are those of the sinks, unless lo is among them.
    base = lo // BN * BN
    SINK_TILES: tl.constexpr = (SINKS + BN - 1) // BN
    num_extra = tl.where(base >= SINK_TILES * BN, SINK_TILES, 0)
    first_sink = tl.minimum(first_tile, num_extra)
    num_sinks = tl.minimum(end_tile, num_extra) - first_sink
    start = base + tl.maximum(first_tile - num_extra, 0) * BN
    stop = base + tl.maximum(end_tile - num_extra, 0) * BN
    return first_sink, num_sinks, start, stop


@triton.jit
def _load_pages(table, tile, lo, hi, SINKS: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr):
    """Physical page of the tile's keys: one number where a tile lies in one page, else one for each key."""
    if PAGE % BN == 0:
        return tl.load(table + tile // PAGE, mask=tile < hi, other=0)
    else:
        key = tile + tl.arange(0, BN)
        return tl.load(table + key // PAGE, mask=((key >= lo) | (key < SINKS)) & (key < hi), other=0)


@triton.jit
def _slots(page, tile, head, K: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr):
    """Of each key of a tile: its (page, head) record, the slot there that it is counted from, and how far from it.

    Records are 64-bit, for a pool passes 2^31 elements easily; what all keys share stays a scalar, to save registers.
    """
    record = page.to(tl.int64) * K + head
    if PAGE % BN == 0:
        return record, tile % PAGE, tl.arange(0, BN)
    else:
        return record, 0, (tile + tl.arange(0, BN)) % PAGE


@triton.jit
def _load_codes(
    pages, record, slot_0, slots, present, d,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, PAD: tl.constexpr, AS_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Of one tile the keys as columns, [DP, BN], or the values as rows, [BN, DP]."""
    at = pages + ((record * PAGE + slot_0) * D + record * (PAGE * PAD)) + slots * D
    if AS_ROWS:
        at = at[:, None] + d[None, :]
        exists = present[:, None] & (d < D)[None, :]
    else:
        at = at[None, :] + d[:, None]
        exists = present[None, :] & (d < D)[:, None]
    if MASKED or DP != D:  # what nobody wrote must not be loaded: a weight of 0 times NaN is NaN
        return tl.load(at, mask=exists, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _load_scales(
    pages, record, slot_0, slots, present,
    D: tl.constexpr, PAGE: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The scale of each key or value of a tile, which lie behind a record's codes; pages are read as float32."""
    at = pages + (record * (PAGE * (D + PAD) // 4) + (PAGE * D // 4) + slot_0) + slots
    if MASKED:
        return tl.load(at, mask=present, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _scores(query, key, scale, softcap, SOFTCAP: tl.constexpr):
    """q k^T of one tile in units of log 2, [BM, BN]."""
    scores = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale
    if SOFTCAP:
        # tanh(x) = (1 - e^-2x) / (1 + e^-2x), and e^-2x = 2^(-2 log2(e) x): log2(e) once more, though x is in log 2.
        decay = tl.math.exp2(-2.8853900817779268 * tl.abs(scores / softcap))
        capped = softcap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(scores < 0, -capped, capped)
    return scores


@triton.jit
def _online_softmax(
    scores, value, value_scale, best, total, acc,
    TOKEN_SCALE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add one tile to the running maximum, sum and weighted values; a row of -inf leaves them as they are."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    shift = new_best
    if MASKED:  # -inf minus -inf is NaN
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.math.exp2(scores - shift[:, None])
    decay = tl.math.exp2(best - shift)
    total = total * decay + tl.sum(weights, 1)
    if TOKEN_SCALE:
        weights *= value_scale[None, :]
    acc = tl.dot(weights.to(COMPUTE), value.to(COMPUTE), acc * decay[:, None], input_precision="ieee")
    return new_best, total, acc


@triton.jit
def _seen(
    index, row, live, row_low, row_visible, row_tree, row_tree_start,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Which keys each row of a tile sees, [BM, BN]."""
    seen = index[None, :] < tl.load(row_visible + row, mask=live, other=0)[:, None]
    if WINDOW:
        before = index[None, :] >= tl.load(row_low + row, mask=live, other=0)[:, None]
        if SINKS > 0:
            before = before | (index < SINKS)[None, :]
    if TREE:
        node = index[None, :] - tl.load(row_tree_start + row, mask=live, other=1 << 30)[:, None]
        word_0 = tl.load(row_tree + 2 * row, mask=live, other=0)
        word_1 = tl.load(row_tree + 2 * row + 1, mask=live, other=0)
        word = tl.where(node < 32, word_0[:, None], word_1[:, None])
        chosen = ((word >> (node & 31)) & 1) != 0
        if WINDOW:
            seen = seen & tl.where(node < 0, before, chosen)
        else:
            seen = seen & ((node < 0) | chosen)
    elif WINDOW:
        seen = seen & before
    return seen


@triton.jit
def sum_with_sink(best, total, sink):
    """(factor of the weighted values, sum of weights) after a logit without a value has joined, in base 2."""
    top = tl.maximum(best, sink)
    return tl.math.exp2(best - top), total * tl.math.exp2(best - top) + tl.math.exp2(sink - top)


@triton.jit
def log_sum(best, total):
    return tl.where(total == 0.0, float("-inf"), best + tl.math.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit(do_not_specialize=["table_stride"])
def attend(
    q,  # [T, Q, D]
    k_pages,  # [pages, K, PAGE, D + PAD]
    v_pages,
    k_scale,  # float32: [K] with HEAD_SCALE, the same memory as k_pages with TOKEN_SCALE, else not read; v_scale too
    v_scale,
    page_table,  # int32 [N, table_stride]
    row_low,  # int32 [T]; not read without WINDOW
    row_visible,  # int32 [T]
    row_tree,  # int32 [T, 2]; these two are not read without TREE
    row_tree_start,  # int32 [T]
    row_list,  # int32: the rows of units with LISTED, else a unit's rows follow each other
    sink_logits,  # float32 [Q] * log2(e); not read without SINK_LOGITS
    header,  # int32: budget, tiles of a head, tiles, units, whether units stay whole
    units,  # int32 [units, 8], see plan.Launch
    cum,  # int32 [units + 1]
    out,  # [T, Q, D]
    partial_out,  # float32 [rows, D]: 2 P BM of cut units, then those of parts
    partial_lse,  # float32 [rows], base 2
    scale,  # softmax scale * log2(e)
    softcap,  # * log2(e); not read without SOFTCAP
    table_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    TREE: tl.constexpr,
    LISTED: tl.constexpr,
    HEAD_SCALE: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    head_tiles = tl.load(header + 1)
    num_units = tl.load(header + 3)
    is_whole = tl.load(header + 4) != 0
    x, end, head, unit = _first_unit(header, cum, program, head_tiles, num_units, is_whole)
    slot = 2 * program  # of the first piece; the next that is cut is the program's last
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    n = tl.arange(0, BN)
    while x < end:
        fields = units + unit * 8
        first_row = tl.load(fields + 1)
        num_rows = tl.load(fields + 2)
        lo = tl.load(fields + 3)
        hi = tl.load(fields + 6)
        unit_start = head * head_tiles + tl.load(cum + unit)
        unit_end = head * head_tiles + tl.load(cum + unit + 1)
        piece_end = tl.where(is_whole, unit_end, tl.minimum(unit_end, end))
        first_sink, num_sinks, start, stop = _keys_of(lo, x - unit_start, piece_end - unit_start, SINKS, BN)
        # The part of them that every row sees.
        inner_lo = tl.minimum(tl.maximum(start, tl.load(fields + 4)), stop)
        inner_hi = tl.maximum(tl.minimum(stop, tl.load(fields + 5)), inner_lo)

        live = (m // G < num_rows) & (m < BM // G * G)
        row = first_row + m // G
        if LISTED:
            row = tl.load(row_list + row, mask=live, other=0)
        at = ((row.to(tl.int64) * (K * G) + head * G + m % G) * D)[:, None] + d[None, :]
        live_d = live[:, None] & (d < D)[None, :]
        query = tl.load(q + at, mask=live_d, other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        unit_scale = scale
        if HEAD_SCALE:
            unit_scale = scale * tl.load(k_scale + head)
        best = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DP], tl.float32)
        table = page_table + tl.load(fields).to(tl.int64) * table_stride

        # The page of the next tile is loaded one tile ahead: with the look-up in the same iteration the compiler keeps
        # one tile in flight instead of STAGES - 1.
        page = _load_pages(table, inner_lo, inner_lo, inner_hi, 0, PAGE, BN)
        for tile in tl.range(inner_lo, inner_hi, BN, num_stages=STAGES):
            next_page = _load_pages(table, tile + BN, inner_lo, inner_hi, 0, PAGE, BN)
            record, slot_0, slots = _slots(page, tile, head, K, PAGE, BN)
            key = _load_codes(k_pages, record, slot_0, slots, n >= 0, d, D, DP, PAGE, PAD, False, False)
            value = _load_codes(v_pages, record, slot_0, slots, n >= 0, d, D, DP, PAGE, PAD, True, False)
            tile_scale = unit_scale
            value_scale = unit_scale
            if TOKEN_SCALE:
                key_scale = _load_scales(k_scale, record, slot_0, slots, n >= 0, D, PAGE, PAD, False)
                tile_scale = unit_scale * key_scale[None, :]
                value_scale = _load_scales(v_scale, record, slot_0, slots, n >= 0, D, PAGE, PAD, False)
            scores = _scores(query, key, tile_scale, softcap, SOFTCAP)
            best, total, acc = _online_softmax(
                scores, value, value_scale, best, total, acc, TOKEN_SCALE, False, query.dtype
            )
            page = next_page

        left = (inner_lo - start) // BN
        # Hoisted out of these few tiles of many rows, values would be held through all others and spilled (sm_100).
        num_edges = left + (stop - inner_hi) // BN
        for edge in tl.range(-num_sinks, num_edges, num_stages=1, disable_licm=BM > 64):
            tile = tl.where(edge < left, start + edge * BN, inner_hi + (edge - left) * BN)
            tile = tl.where(edge < 0, (first_sink + num_sinks + edge) * BN, tile)
            index = tile + n
            present = ((index >= lo) | (index < SINKS)) & (index < hi)
            page = _load_pages(table, tile, lo, hi, SINKS, PAGE, BN)
            record, slot_0, slots = _slots(page, tile, head, K, PAGE, BN)
            key = _load_codes(k_pages, record, slot_0, slots, present, d, D, DP, PAGE, PAD, False, True)
            value = _load_codes(v_pages, record, slot_0, slots, present, d, D, DP, PAGE, PAD, True, True)
            tile_scale = unit_scale
            value_scale = unit_scale
            if TOKEN_SCALE:
                key_scale = _load_scales(k_scale, record, slot_0, slots, present, D, PAGE, PAD, True)
                tile_scale = unit_scale * key_scale[None, :]
                value_scale = _load_scales(v_scale, record, slot_0, slots, present, D, PAGE, PAD, True)
            scores = _scores(query, key, tile_scale, softcap, SOFTCAP)
            seen = _seen(index, row, live, row_low, row_visible, row_tree, row_tree_start, SINKS, WINDOW, TREE)
            scores = tl.where(seen, scores, float("-inf"))
            best, total, acc = _online_softmax(
                scores, value, value_scale, best, total, acc, TOKEN_SCALE, True, query.dtype
            )

        if HEAD_SCALE:
            acc *= tl.load(v_scale + head)
        part = tl.load(fields + 7)
        has_all = (x == unit_start) & (piece_end == unit_end)
        is_result = has_all & (part < 0)
        if SINK_LOGITS:  # once for each row: where its result is written
            factor, with_sink = sum_with_sink(best, total, tl.load(sink_logits + head * G + m % G))
            acc *= tl.where(is_result, factor, 1.0)[:, None]
            total = tl.where(is_result, with_sink, total)
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if is_result:
            tl.store(out + at, result.to(out.dtype.element_ty), mask=live_d)
        else:
            place = tl.where(has_all, part + head * (num_rows * G), slot * BM)
            # d, though the compiler cannot know: the offsets of a whole tile are then not kept from unit to unit.
            column = d + tl.minimum(num_rows, 0)
            tl.store(partial_out + place.to(tl.int64) * D + (m[:, None] * D + column[None, :]), result, mask=live_d)
            tl.store(partial_lse + place + m, log_sum(best, total), mask=live)
        x = piece_end
        slot = 2 * program + 1
        last = unit + 1 == num_units
        unit = tl.where(last, 0, unit + 1)
        head = tl.where(last, head + 1, head)

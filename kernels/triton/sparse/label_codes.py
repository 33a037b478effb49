"""Labels of 4 bits on a GPU: written by the kernel that writes metadata, read by the one that scores keys.

Bit for bit `kernels.label_codes`: a code is counted by comparisons, because a GPU's quick division rounds otherwise.
Legend: R sparse rows, Q query heads, K kv heads, G = Q / K, U keys, C channels, B = ceil(C / 2) bytes of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sparse import SparseLayer
from kernels.triton.sparse.scores import store_scores
from kernels.triton.tiles import next_power_of_two


@triton.jit
def _counted(x, scale):
    """Codes of x, stored as code + 8."""
    size = tl.abs(x)
    above = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(7):
        above += (size > (i + 0.5) * scale).to(tl.int32)
    return 8 + tl.where(x < 0, -above, above)


@triton.jit
def write_codes(key, channels, codes, scales, at, C: tl.constexpr, CP: tl.constexpr):
    """One key's: `key` points to its elements, `channels` to its head's; `at` is its place among all keys and heads."""
    B: tl.constexpr = (C + 1) // 2
    b = tl.arange(0, CP)
    of_low = tl.load(channels + b, mask=b < B, other=0)
    of_high = tl.load(channels + B + b, mask=B + b < C, other=0)
    low = tl.load(key + of_low, mask=b < B, other=0.0).to(tl.float32)
    high = tl.load(key + of_high, mask=B + b < C, other=0.0).to(tl.float32)
    share = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0) * 0.14285714285714285
    # To the nearest bfloat16, of two as near the even one: by hand, because the interpreter's conversion cuts off.
    bits = share.to(tl.int32, bitcast=True)
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    tl.store(scales + at, scale.to(tl.bfloat16))
    pairs = _counted(low, scale) | (_counted(high, scale) << 4)
    tl.store(codes + at * B + b, pairs.to(tl.uint8), mask=b < B)


@triton.jit(do_not_specialize=["table_stride", "width"])
def code_scores(
    q,  # [R, Q, D]
    codes,  # uint8 [pages, K, PAGE, B]
    label_scales,  # bfloat16 [pages, K, PAGE]
    channels,  # int32 [K, C]
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
    D: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (R, K, splits)."""
    B: tl.constexpr = (C + 1) // 2
    row = tl.program_id(0)
    head = tl.program_id(1)
    visible = tl.load(row_visible + row)
    if visible > tl.load(budgets + row):
        part = tl.cdiv(tl.cdiv(visible, BN), tl.num_programs(2)) * BN
        start = tl.program_id(2) * part
        end = tl.minimum(start + part, visible)
        n = tl.arange(0, BN)
        b = tl.arange(0, CP)
        of_low = tl.load(channels + head * C + b, mask=b < B, other=0)
        of_high = tl.load(channels + head * C + B + b, mask=B + b < C, other=0)
        query = q + ((row * K + head).to(tl.int64) * G) * D
        out = (row * K + head).to(tl.int64) * width
        table = page_table + tl.load(row_seq + row).to(tl.int64) * table_stride
        page = tl.load(table + (start + n) // PAGE, mask=start + n < end, other=0)
        for tile in tl.range(start, end, BN, num_stages=STAGES):
            # One tile ahead, as in attention: the look-up must not wait for itself.
            following = tile + BN + n
            next_page = tl.load(table + following // PAGE, mask=following < end, other=0)
            at = (page.to(tl.int64) * K + head) * PAGE + (tile + n) % PAGE
            exists = tile + n < end
            pairs = tl.load(codes + at[:, None] * B + b[None, :], mask=exists[:, None] & (b < B)[None, :], other=0)
            pairs = pairs.to(tl.int32)
            low = ((pairs & 15) - 8).to(tl.float32)
            high = ((pairs >> 4) - 8).to(tl.float32)
            best = tl.full([BN], float("-inf"), tl.float32)
            for member in tl.static_range(G):
                q_low = tl.load(query + member * D + of_low, mask=b < B, other=0.0).to(tl.float32)
                q_high = tl.load(query + member * D + of_high, mask=B + b < C, other=0.0).to(tl.float32)
                best = tl.maximum(best, tl.sum(low * q_low[None, :] + high * q_high[None, :], 1))
            step = tl.load(label_scales + at, mask=exists, other=0.0).to(tl.float32)
            store_scores(scores, out + tile + n, best * step, scale, exists)
            page = next_page


def score_codes(
    q_RQD: Tensor, layer: SparseLayer, page_table: Tensor, row_seq_R: Tensor, visible_R: Tensor, budgets_R: Tensor,
    scores_RKU: Tensor, scale: float, splits: int,
) -> None:  # fmt: skip
    """Of rows that see more keys than their budget: max over a group's heads of scale q.k, keys [0, visible), by labels
    of 4 bits. scores_RKU is float16, at least as wide as the longest row."""
    codes, scales, channels_KC = layer.labels, layer.label_scales, layer.channels
    if codes is None or scales is None or channels_KC is None or codes.dtype != torch.uint8:
        raise ValueError("keys are scored by labels of 4 bits in a layer that keeps none")
    num_kv, page_size = codes.shape[1:3]
    code_scores[(len(q_RQD), num_kv, splits)](
        q_RQD, codes, scales, channels_KC, page_table, row_seq_R, visible_R, budgets_R, scores_RKU, scale,
        page_table.stride(0), scores_RKU.shape[2],
        K=num_kv, G=q_RQD.shape[1] // num_kv, D=q_RQD.shape[2], C=channels_KC.shape[1],
        CP=next_power_of_two(codes.shape[3]), PAGE=page_size,
        BN=128 if codes.shape[3] <= 16 else 64, STAGES=3, num_warps=4, num_stages=3,
    )  # fmt: skip

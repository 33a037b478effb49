"""Split the fused q | k | v, normalise the heads of q and k, rotate them, write K and V to their pages: one launch.

A program holds HEADS heads of one row, in three parts: the two halves that turn with each other, the rest of the head.
Products as in the reference: the norm is rounded to the model's dtype before the rotation, which is in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.triton.tiles import next_power_of_two

_HEADS = 8


@triton.jit
def _weights(norm, columns, exists):
    return tl.load(norm + columns, mask=exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def qkv_rope(
    qkv,  # [T, (Q + 2 K) * D]
    cos_sin,  # float32 [M, R]
    q_norm,  # [D]; not read without Q_NORM, k_norm likewise
    k_norm,
    positions,  # int32 [T]
    slots,  # int64 [T]
    q_out,  # [T, Q, D]
    k_pages,  # [pages, K, PAGE, D]
    v_pages,
    eps,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,  # D - R padded, 0 where all of the head turns
    PAGE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = head < Q
    is_k = (head >= Q) & (head < Q + K)
    is_v = (head >= Q + K) & (head < Q + 2 * K)
    source = qkv + (row * (Q + 2 * K) + head)[:, None] * D
    i = tl.arange(0, HALF_P)
    turns = (i < HALF)[None, :]
    exists = (is_q | is_k | is_v)[:, None]
    first = tl.load(source + i[None, :], mask=exists & turns, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + i[None, :], mask=exists & turns, other=0.0).to(tl.float32)
    if REST_P > 0:
        j = 2 * HALF + tl.arange(0, REST_P)
        stays = (j < D)[None, :]
        rest = tl.load(source + j[None, :], mask=exists & stays, other=0.0).to(tl.float32)
    if Q_NORM or K_NORM:
        normed = (is_q & Q_NORM) | (is_k & K_NORM)
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST_P > 0:
            squares += tl.sum(rest * rest, 1)
        inverse = (1.0 / tl.sqrt(squares / D + eps))[:, None]
        by_q = is_q[:, None]
        kind = qkv.dtype.element_ty
        scaled = first * inverse * tl.where(by_q, _weights(q_norm, i, i < HALF), _weights(k_norm, i, i < HALF))
        first = tl.where(normed[:, None], scaled.to(kind).to(tl.float32), first)
        w = tl.where(by_q, _weights(q_norm, HALF + i, i < HALF), _weights(k_norm, HALF + i, i < HALF))
        second = tl.where(normed[:, None], (second * inverse * w).to(kind).to(tl.float32), second)
        if REST_P > 0:
            w = tl.where(by_q, _weights(q_norm, j, j < D), _weights(k_norm, j, j < D))
            rest = tl.where(normed[:, None], (rest * inverse * w).to(kind).to(tl.float32), rest)
    angles = cos_sin + tl.load(positions + row).to(tl.int64) * (2 * HALF)
    cos = tl.load(angles + i, mask=i < HALF, other=1.0)[None, :]
    sin = tl.load(angles + HALF + i, mask=i < HALF, other=0.0)[None, :]
    v_head = is_v[:, None]
    turned_first = tl.where(v_head, first, first * cos - second * sin)
    turned_second = tl.where(v_head, second, second * cos + first * sin)

    slot = tl.load(slots + row)
    # All 64-bit: a pool passes 2^31 elements easily.
    in_page = (slot // PAGE) * K * PAGE + slot % PAGE
    q_at = q_out + (row * Q + head)[:, None] * D
    k_at = k_pages + (in_page + (head - Q) * PAGE)[:, None] * D
    v_at = v_pages + (in_page + (head - Q - K) * PAGE)[:, None] * D
    first = turned_first.to(q_out.dtype.element_ty)
    second = turned_second.to(q_out.dtype.element_ty)
    tl.store(q_at + i[None, :], first, mask=is_q[:, None] & turns)
    tl.store(q_at + HALF + i[None, :], second, mask=is_q[:, None] & turns)
    tl.store(k_at + i[None, :], first, mask=is_k[:, None] & turns)
    tl.store(k_at + HALF + i[None, :], second, mask=is_k[:, None] & turns)
    tl.store(v_at + i[None, :], first, mask=v_head & turns)
    tl.store(v_at + HALF + i[None, :], second, mask=v_head & turns)
    if REST_P > 0:
        rest = rest.to(q_out.dtype.element_ty)
        tl.store(q_at + j[None, :], rest, mask=is_q[:, None] & stays)
        tl.store(k_at + j[None, :], rest, mask=is_k[:, None] & stays)
        tl.store(v_at + j[None, :], rest, mask=v_head & stays)


def qkv_rope_write(
    qkv_TX: Tensor,
    num_q: int,
    num_kv: int,
    head_dim: int,
    cos_sin_MR: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
) -> Tensor:
    """`Ops.qkv_rope_write`. Raises ValueError if the page tensors are not as allocate_kv makes them."""
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous, as allocate_kv makes them")
    num_rows, rotary = qkv_TX.shape[0], cos_sin_MR.shape[1]
    q_TQD = torch.empty((num_rows, num_q, head_dim), dtype=qkv_TX.dtype, device=qkv_TX.device)
    unused = cos_sin_MR
    if num_rows:
        qkv_rope[(num_rows, triton.cdiv(num_q + 2 * num_kv, _HEADS))](
            qkv_TX.contiguous(), cos_sin_MR.contiguous(),
            unused if q_norm_D is None else q_norm_D, unused if k_norm_D is None else k_norm_D,
            rows.positions, rows.slots, q_TQD, k_pages, v_pages, eps,
            Q=num_q, K=num_kv, D=head_dim, HALF=rotary // 2, HALF_P=next_power_of_two(rotary // 2),
            REST_P=next_power_of_two(head_dim - rotary) if rotary < head_dim else 0, PAGE=k_pages.shape[2],
            Q_NORM=q_norm_D is not None, K_NORM=k_norm_D is not None, HEADS=_HEADS, num_warps=4,
        )  # fmt: skip
    return q_TQD

"""Split the fused q | k | v, normalise the heads of q and k, rotate them, write K and V to their pages: one launch.

A program holds HEADS heads of one row, in three parts: the two halves that turn with each other, the rest of the head.
Products as in the reference: the norm is rounded to the model's dtype before the rotation, which is in float32; what
int8 and fp8 pages get (`kv_format.py`) is rounded from the model's dtype once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_format import FP8, check_scale, scale_pointers
from kernels.ops import AttentionRows
from kernels.triton.tiles import next_power_of_two

_HEADS = 8


@triton.jit
def _weights(norm, columns, exists):
    return tl.load(norm + columns, mask=exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _fp8_bits(x):
    """e4m3 codes of float32, nearest even, as uint8; beyond 448 it is 448, NaN stays NaN.

    In integers, so that the interpreter, whose fp8 stores are wrong, computes what a GPU does.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = (((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)).to(tl.int32)
    # Below 2^-6 codes are multiples of 2^-9: adding 2^14 leaves those in the float's last bits, rounded.
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, small, normal)
    return (tl.where(x == x, code, 0x7F) | sign).to(tl.uint8)


@triton.jit
def _int8_codes(x, scale):
    """round(x / scale), nearest even: adding and taking away 1.5 * 2^23 rounds to an integer."""
    codes = (tl.div_rn(x, scale) + 12582912.0) - 12582912.0
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return tl.where(codes == codes, codes, 0.0).to(tl.int8)


@triton.jit
def _greatest(x, exists):
    """Of each row; NaN if the row has one, so that a reader sees it."""
    size = tl.abs(tl.where(exists, x.to(tl.float32), 0.0))
    return tl.max(size, 1) + tl.sum(tl.where(size == size, 0.0, size), 1)


@triton.jit
def _normed(x, inverse, normed, is_q, q_norm, k_norm, i, exists, kind: tl.constexpr):
    """Elements `i` of each head; of heads that are normed, times their weights and rounded to the model's dtype."""
    weights = tl.where(is_q[:, None], _weights(q_norm, i, exists), _weights(k_norm, i, exists))
    return tl.where(normed[:, None], (x * inverse * weights).to(kind).to(tl.float32), x)


@triton.jit
def _stored(x, kind: tl.constexpr, divisor, FP8: tl.constexpr, TOKEN_SCALE: tl.constexpr):
    """What pages get of values already rounded to the model's dtype."""
    if TOKEN_SCALE:
        return _int8_codes(x.to(tl.float32), divisor)
    elif FP8:
        return _fp8_bits(tl.div_rn(x.to(tl.float32), divisor))
    else:
        return x.to(kind)


@triton.jit
def qkv_rope(
    qkv,  # [T, (Q + 2 K) * D]
    cos_sin,  # float32 [M, R]
    q_norm,  # [D]; not read without Q_NORM, k_norm likewise
    k_norm,
    positions,  # int32 [T]
    slots,  # int64 [T]
    q_out,  # [T, Q, D]
    k_pages,  # [pages, K, PAGE, D + PAD], fp8 pages as uint8
    v_pages,
    k_scale,  # float32: [K] with HEAD_SCALE, the same memory as k_pages with TOKEN_SCALE, else not read; v_scale too
    v_scale,
    eps,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,  # D - R padded, 0 where all of the head turns
    PAGE: tl.constexpr,
    PAD: tl.constexpr,
    FP8: tl.constexpr,
    HEAD_SCALE: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
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
        kind = qkv.dtype.element_ty
        first = _normed(first, inverse, normed, is_q, q_norm, k_norm, i, i < HALF, kind)
        second = _normed(second, inverse, normed, is_q, q_norm, k_norm, HALF + i, i < HALF, kind)
        if REST_P > 0:
            rest = _normed(rest, inverse, normed, is_q, q_norm, k_norm, j, j < D, kind)
    angles = cos_sin + tl.load(positions + row).to(tl.int64) * (2 * HALF)
    cos = tl.load(angles + i, mask=i < HALF, other=1.0)[None, :]
    sin = tl.load(angles + HALF + i, mask=i < HALF, other=0.0)[None, :]
    v_head = is_v[:, None]
    turned_first = tl.where(v_head, first, first * cos - second * sin)
    turned_second = tl.where(v_head, second, second * cos + first * sin)

    first = turned_first.to(q_out.dtype.element_ty)
    second = turned_second.to(q_out.dtype.element_ty)
    q_at = q_out + (row * Q + head)[:, None] * D
    tl.store(q_at + i[None, :], first, mask=is_q[:, None] & turns)
    tl.store(q_at + HALF + i[None, :], second, mask=is_q[:, None] & turns)
    if REST_P > 0:
        rest = rest.to(q_out.dtype.element_ty)
        tl.store(q_at + j[None, :], rest, mask=is_q[:, None] & stays)

    slot = tl.load(slots + row)
    # All 64-bit: a pool passes 2^31 elements easily.
    record = slot // PAGE * K + tl.where(is_k, head - Q, head - Q - K)
    in_page = slot % PAGE
    at = (record * (PAGE * (D + PAD)) + in_page * D)[:, None]
    divisor = tl.full([HEADS, 1], 1.0, tl.float32)
    if HEAD_SCALE:
        of_k = tl.load(k_scale + head - Q, mask=is_k, other=1.0)
        divisor = tl.where(is_k, of_k, tl.load(v_scale + head - Q - K, mask=is_v, other=1.0))[:, None]
    if TOKEN_SCALE:
        most = tl.maximum(_greatest(first, turns), _greatest(second, turns))
        if REST_P > 0:
            most = tl.maximum(most, _greatest(rest, stays))
        scale = tl.div_rn(most, tl.full([HEADS], 127.0, tl.float32))
        scale_at = record * (PAGE * (D + PAD) // 4) + (PAGE * D // 4) + in_page
        tl.store(k_scale + scale_at, scale, mask=is_k)
        tl.store(v_scale + scale_at, scale, mask=is_v)
        divisor = tl.where(scale == 0.0, 1.0, scale)[:, None]
    kind = k_pages.dtype.element_ty
    first_code = _stored(first, kind, divisor, FP8, TOKEN_SCALE)
    second_code = _stored(second, kind, divisor, FP8, TOKEN_SCALE)
    tl.store(k_pages + at + i[None, :], first_code, mask=is_k[:, None] & turns)
    tl.store(k_pages + at + HALF + i[None, :], second_code, mask=is_k[:, None] & turns)
    tl.store(v_pages + at + i[None, :], first_code, mask=v_head & turns)
    tl.store(v_pages + at + HALF + i[None, :], second_code, mask=v_head & turns)
    if REST_P > 0:
        rest_code = _stored(rest, kind, divisor, FP8, TOKEN_SCALE)
        tl.store(k_pages + at + j[None, :], rest_code, mask=is_k[:, None] & stays)
        tl.store(v_pages + at + j[None, :], rest_code, mask=v_head & stays)


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
    kv_scale_2K: Tensor | None = None,
) -> Tensor:
    """`Ops.qkv_rope_write`. Raises ValueError if the page tensors are not as allocate_kv makes them."""
    check_scale(k_pages, kv_scale_2K)
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous, as allocate_kv makes them")
    num_rows, rotary = qkv_TX.shape[0], cos_sin_MR.shape[1]
    q_TQD = torch.empty((num_rows, num_q, head_dim), dtype=qkv_TX.dtype, device=qkv_TX.device)
    unused = cos_sin_MR
    is_fp8 = k_pages.dtype == FP8
    codes = (k_pages.view(torch.uint8), v_pages.view(torch.uint8)) if is_fp8 else (k_pages, v_pages)
    if num_rows:
        qkv_rope[(num_rows, triton.cdiv(num_q + 2 * num_kv, _HEADS))](
            qkv_TX.contiguous(), cos_sin_MR.contiguous(),
            unused if q_norm_D is None else q_norm_D, unused if k_norm_D is None else k_norm_D,
            rows.positions, rows.slots, q_TQD, *codes, *scale_pointers(k_pages, v_pages, kv_scale_2K), eps,
            Q=num_q, K=num_kv, D=head_dim, HALF=rotary // 2, HALF_P=next_power_of_two(rotary // 2),
            REST_P=next_power_of_two(head_dim - rotary) if rotary < head_dim else 0, PAGE=k_pages.shape[2],
            PAD=k_pages.shape[3] - head_dim, FP8=is_fp8, HEAD_SCALE=kv_scale_2K is not None,
            TOKEN_SCALE=k_pages.dtype == torch.int8,
            Q_NORM=q_norm_D is not None, K_NORM=k_norm_D is not None, HEADS=_HEADS, num_warps=4,
        )  # fmt: skip
    return q_TQD

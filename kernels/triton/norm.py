"""RMSNorm, alone or behind the addition of a residual: each input read once, each output written once.

One row per program, sums in float32; the sum of the residual is rounded to the stream's dtype before it is normalised,
as two operations would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.tiles import next_power_of_two


@triton.jit
def _rms_norm(
    x,  # [T, H]
    residual,  # [T, H]; not read without RESIDUAL, as total is not written
    weight,  # [H]
    out,
    total,
    eps,
    H: tl.constexpr,
    HP: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP)
    exists = h < H
    value = tl.load(x + row * H + h, mask=exists, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row * H + h, mask=exists, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * H + h, rounded, mask=exists)
        value = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / H + eps)
    scaled = value * inverse * tl.load(weight + h, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * H + h, scaled.to(out.dtype.element_ty), mask=exists)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""
    return _launch(x, None, weight_H, eps)[0]


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual): the end of one half of a layer and the start of the next, in one pass."""
    return _launch(x_TH, residual_TH, weight_H, eps)


def _launch(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    flat = x.contiguous().view(-1, size)
    out = torch.empty_like(flat)
    total = out if residual is None else torch.empty_like(flat)
    added = flat if residual is None else residual.contiguous()
    padded = next_power_of_two(size)
    if len(flat):
        _rms_norm[(len(flat),)](
            flat, added, weight_H, out, total, eps,
            H=size, HP=padded, RESIDUAL=residual is not None, num_warps=min(16, max(1, padded // 512)),
        )  # fmt: skip
    return out.view(x.shape), total.view(x.shape)

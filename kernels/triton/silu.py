"""silu(gate) * up of a fused gate | up product: each input read once, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_mul(gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741 (the legend's letter)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * I + i, value.to(out.dtype.element_ty), mask=i < I)


def silu_mul(gate_up_TX: Tensor) -> Tensor:
    """silu(first half of the row) * second half: [T, 2 I] -> [T, I]."""
    num_rows, width = gate_up_TX.shape
    out_TI = torch.empty((num_rows, width // 2), dtype=gate_up_TX.dtype, device=gate_up_TX.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(width // 2, _BLOCK))
        _silu_mul[grid](gate_up_TX.contiguous(), out_TI, I=width // 2, BLOCK=_BLOCK, num_warps=4)
    return out_TI

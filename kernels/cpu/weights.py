"""Weights as the CPU kernels read them: panels of 32 output features (linear.h), plain or quantised.

Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import library
from kernels.ops import PackedLinear


@dataclass(frozen=True)
class CpuLinear:
    """A weight as panels of 32 output features (linear.h), with the tensors that its pointers point into."""

    out_features: int
    in_features: int
    struct: library.Weight
    tensors: tuple[Tensor, ...]
    onednn: tuple[Tensor, Tensor | None] | None = None
    """Weight as oneDNN packed it, and bias, where the back end may use oneDNN."""

    @property
    def num_bytes(self) -> int:
        own = sum(tensor.nbytes for tensor in self.tensors)
        return own if self.onednn is None else own + 2 * self.out_features * self.in_features


def packed_here(weight: PackedLinear, in_features: int) -> CpuLinear:
    if not isinstance(weight, CpuLinear):
        raise TypeError(f"this weight was packed by another back end ({type(weight).__name__})")
    if weight.in_features != in_features:
        raise ValueError(f"rows have {in_features} features, but the weight takes {weight.in_features}")
    return weight


def quantised_panels(weight_NK: Tensor, padded_out: int, quantization: str) -> tuple[tuple[Tensor, Tensor], int]:
    """Panels and scales of a weight rounded to int8 (a scale per output) or int4 (per output and 32 inputs), and their
    WeightFormat. Symmetric; an output or group of zeros gets a tiny scale."""
    num_out, num_in = weight_NK.shape
    per_word = 4 // weight_NK.element_size()
    steps = -(-num_in // per_word)
    weight = F.pad(weight_NK.float(), (0, steps * per_word - num_in, 0, padded_out - num_out))
    if quantization == "int8":
        scale_N = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        return (_by_panel((weight / scale_N[:, None]).round().to(torch.int8)), scale_N.contiguous()), library.INT8
    groups = F.pad(weight, (0, -weight.shape[1] % library.INT4_GROUP)).view(padded_out, -1, library.INT4_GROUP)
    scale_NG = (groups.abs().amax(2) / 7).clamp_min(1e-12)
    nibbles = (groups / scale_NG[:, :, None]).round().clamp(-7, 7).to(torch.int16) + 8
    nibbles = _by_panel(nibbles.view(padded_out, -1)[:, : weight.shape[1]])
    low, high = nibbles.chunk(2, dim=-1)
    return ((low | (high << 4)).to(torch.uint8).contiguous(), _by_panel(scale_NG)), library.INT4


def _by_panel(weight_NX: Tensor) -> Tensor:
    """[N, X] -> [N / 32, X, 32]: the outputs of a panel side by side."""
    return weight_NX.view(-1, library.PANEL, weight_NX.shape[1]).transpose(1, 2).contiguous()


def is_bf16(tensor: Tensor) -> bool:
    if tensor.dtype is torch.bfloat16:
        return True
    if tensor.dtype is torch.float32:
        return False
    raise TypeError(f"the CPU kernels compute in bfloat16 and float32, not in {tensor.dtype}")


def activations(x_TK: Tensor, weight: CpuLinear) -> Tensor:
    if is_bf16(x_TK) != (weight.struct.dtype == library.BF16):
        raise TypeError(f"rows are {x_TK.dtype}, but the weight was packed for another dtype")
    return x_TK.contiguous()

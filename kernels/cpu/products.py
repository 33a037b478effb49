"""Products of queries and keys for choosing, on the kernels of linear layers: each row alone decides its bits."""

from __future__ import annotations

from ctypes import CDLL, c_void_p

import torch
from torch import Tensor

from kernels.cpu import library


class KeyProducts:
    """Keys [K, J, C] as weights: q [K, R, C] -> float32 [K, R, count], with the first `count` of them."""

    def __init__(self, lib: CDLL, pool: c_void_p, k_KJC: Tensor) -> None:
        self._lib, self._pool, self._dtype = lib, pool, k_KJC.dtype
        self._packed = [self._pack(k_JC) for k_JC in k_KJC]

    def _pack(self, k_JC: Tensor) -> tuple[library.Weight, Tensor]:
        num_keys, size = k_JC.shape
        per_word = 4 // k_JC.element_size()
        padded, steps = -(-num_keys // library.PANEL) * library.PANEL, -(-size // per_word)
        panels = torch.empty(padded * steps * per_word, dtype=k_JC.dtype)
        k_JC = k_JC.contiguous()
        self._lib.braid_pack(self._pool, k_JC.data_ptr(), num_keys, size, k_JC.element_size(), panels.data_ptr())
        kind = library.BF16 if per_word == 2 else library.FLOAT
        struct = library.Weight(
            panels=panels.data_ptr(), scales=None, bias=None, n=num_keys, k=size, format=kind, dtype=kind
        )
        return struct, panels

    def __call__(self, q_KRC: Tensor, count: int) -> Tensor:
        num_rows = q_KRC.shape[1]
        out = []
        for q_RC, (struct, _) in zip(q_KRC.to(self._dtype).contiguous(), self._packed, strict=True):
            y_RJ = torch.empty((num_rows, struct.n), dtype=torch.float32)
            self._lib.braid_linear(self._pool, struct, q_RC.data_ptr(), num_rows, None, y_RJ.data_ptr(), 1)
            out.append(y_RJ[:, :count])
        return torch.stack(out)

"""Small host arrays to the device in one copy, from pinned memory, so that nobody waits: what a step's rules say of its
rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 16
"""Bytes that each array starts at a multiple of, so that launches are compiled for aligned pointers alone."""


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays, flat, as views of one buffer; 4 or 8 bytes an element."""
    ends = np.cumsum([-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays]).tolist()
    staged = torch.zeros(max(ends[-1], _ALIGN), dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = staged.numpy()
    starts = [0, *ends[:-1]]
    for start, array in zip(starts, arrays, strict=True):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    on_device = staged.to(device, non_blocking=True)
    return [
        on_device[start : start + array.nbytes].view(torch.from_numpy(array.reshape(-1)[:0]).dtype)
        for start, array in zip(starts, arrays, strict=True)
    ]

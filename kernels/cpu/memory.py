"""Memory for records that are read a page here and a page there."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

_HUGE = 2 << 20


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that nobody has had before, so that the system may give it in huge pages: a record is smaller than one of
    its usual pages, and each would miss the TLB. Where there are none, or for little memory, nothing is lost."""
    count = prod(shape)
    size = count * dtype.itemsize
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return torch.frombuffer(memory, dtype=dtype, offset=-start % _HUGE, count=count).view(shape)

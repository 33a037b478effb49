"""A step's inputs on their way to the device, packed into one buffer of pinned memory and sent in one copy; and what
was sampled on its way back.

A copy from or to pinned memory does not wait for the device; torch keeps the memory from being used again before it is
done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Field = tuple[tuple[int, ...], "np.dtype[Any]"]
"""Shape and type of an array."""
_ALIGN = 64
"""Bytes at whose multiples arrays start: the alignment of a pointer is part of what Triton compiles for."""
_TORCH = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


class Layout:
    """Where some arrays (int32 or int64) lie in one buffer."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self._places: list[tuple[int, int, Field]] = []
        self.num_bytes = 0
        for shape, dtype in fields:
            size = math.prod(shape) * dtype.itemsize
            self._places.append((self.num_bytes, size, (shape, dtype)))
            self.num_bytes += -(-size // _ALIGN) * _ALIGN

    def on_host(self, buffer: NDArray[np.uint8]) -> list[Array]:
        return [buffer[at : at + size].view(dtype).reshape(shape) for at, size, (shape, dtype) in self._places]

    def on_device(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[at : at + size].view(_TORCH[dtype]).view(shape) for at, size, (shape, dtype) in self._places]


class Transfer:
    """Copies to one device."""

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"

    def stage(self, num_bytes: int) -> Tensor:
        """Host memory to write, uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)

    def send(self, staged: Tensor, target: Tensor) -> None:
        """Copy to the front of `target`, uint8 on the device; what was staged must not be written again."""
        target[: len(staged)].copy_(staged, non_blocking=True)


def upload(arrays: Sequence[Array], device: torch.device, transfer: Transfer | None = None) -> list[Tensor]:
    """The arrays on a device, in one copy; on a CPU tensors over the same memory, unless `transfer` is given."""
    if transfer is None:
        if device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        transfer = Transfer(device)
    layout = Layout([(array.shape, array.dtype) for array in arrays])
    staged = transfer.stage(layout.num_bytes)
    for part, array in zip(layout.on_host(staged.numpy()), arrays, strict=True):
        part[...] = array
    target = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
    transfer.send(staged, target)
    return layout.on_device(target)


class Download:
    """A tensor on its way to the host, from where the stream is now. Later work on the stream does not hold it up."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host

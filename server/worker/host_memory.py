"""How this process asks the C library for memory: glibc's malloc, told what a worker's steps are like."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt(3)."""


def keep_step_buffers() -> None:
    """Let malloc keep a step's buffers for the next step instead of mapping and clearing fresh pages every time.

    Two arenas are enough: the loop's thread makes nearly all allocations, and each further arena holds memory back.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


def return_free_memory() -> None:
    """Give back what loading needed and the model does not keep."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

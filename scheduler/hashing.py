"""The hash that fake workers use for KV (fake_worker.py, fake_denoiser.py). Not for anything that must be secret."""

from __future__ import annotations

_MASK = (1 << 64) - 1
EMPTY = 0x9E3779B97F4A7C15
"""The KV before the first token."""


def mix(state: int, value: int) -> int:
    """A 64-bit hash of `state` and `value` (the finaliser of splitmix64 over their combination)."""
    z = (state * 0x100000001B3 + value + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)

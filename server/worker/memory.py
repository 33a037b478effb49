"""How a device's memory is divided: steps' needs are measured, the KV pages get what is left of what may be used.

Numbers only: a reading comes from `accelerator.py`, or from a test.
Source: vLLM's sizing, total x utilization - weights - activation peak - what torch does not know of - graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

Ledger = tuple[tuple[str, int], ...]
"""(what, bytes) of all that is held."""
ON_HOST = "KV pages on the host"
"""What of it a device does not hold."""


class MemoryReading(NamedTuple):
    """Bytes of a device.

    total, free     as its driver says, of all programs
    allocated       this process's tensors; peak: the most of them since the last `reset_peak`
    reserved        what the allocator of tensors holds, `allocated` included
    """

    total: int
    free: int
    allocated: int
    reserved: int
    peak: int


class Meter(Protocol):
    """Who reads a device's memory. What the allocator holds without need is given back before a reading."""

    def read(self) -> MemoryReading: ...
    def reset_peak(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that are taken before there is a KV page. other: programs beside this one, the device's own libraries, and
    models that were loaded before."""

    total: int
    other: int
    weights: int
    activations: int
    graphs: int

    @property
    def taken(self) -> int:
        return self.other + self.weights + self.activations + self.graphs

    def __str__(self) -> str:
        return (
            f"weights take {show(self.weights)}, a step {show(self.activations)}, CUDA graphs {show(self.graphs)}, "
            f"other programs, libraries and models {show(self.other)}"
        )


def peak_of(meter: Meter, run: Callable[[], None]) -> int:
    """Most bytes that `run` allocates at once, above what there is before it."""
    before = meter.read().allocated
    meter.reset_peak()
    run()
    return max(0, meter.read().peak - before)


def graph_bytes(readings: Sequence[MemoryReading], num_graphs: int) -> int:
    """Memory of `num_graphs` graphs, from readings before any, after the largest and, if there is one, after another.

    The largest takes the memory that all share; what another adds is taken for what each adds.
    """
    taken = [before.free - after.free for before, after in pairwise(readings)]
    if not taken:
        return 0
    each = max(0, taken[1]) if len(taken) > 1 else 0
    return max(0, taken[0]) + each * (num_graphs - 1)


def kv_budget(needs: Needs, utilization: float, asked: int | None) -> int:
    """Bytes for KV pages: what the user asked for if the device has it, or what is left of the part that may be used.

    Raises ValueError naming the setting if it does not fit, or if nothing is left.
    """
    if asked is not None:
        left = needs.total - needs.taken
        if asked > left:
            raise ValueError(
                f"kv_cache_bytes (--kv-cache-memory) is {show(asked)}, but of this device's {show(needs.total)} "
                f"{needs}: at most {show(max(0, left))} can be had"
            )
        return asked
    usable = int(needs.total * utilization)
    if usable <= needs.taken:
        raise ValueError(
            f"gpu_memory_utilization (--gpu-memory-utilization) is {utilization:g}: {show(usable)} of this device's "
            f"{show(needs.total)}; {needs}: nothing is left for the KV cache. Raise it above "
            f"{needs.taken / needs.total:.3f}, or lower --max-num-batched-tokens, or take --enforce-eager"
        )
    return usable - needs.taken


def ledger(needs: Needs, kv: int) -> Ledger:
    """All of the device's memory, by what holds it."""
    parts = (
        ("weights", needs.weights),
        ("KV pages", kv),
        ("activations", needs.activations),
        ("CUDA graphs", needs.graphs),
        ("other", needs.other),
    )
    return (*parts, ("unused", needs.total - needs.taken - kv))


def show(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"

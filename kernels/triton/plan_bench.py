# ruff: noqa: T201
"""`python -m kernels.triton.plan_bench`: host time of planning a step's attention, 8 kv heads, 4 query heads each.

Least and median of many calls on this machine's CPU; no GPU, no launch. A step is planned once, not once a layer.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from kernels.ops import StepRows
from kernels.triton.plan import plan_step, row_masks

STEPS = {
    "256 decodes": ([1] * 256, None),
    "256 decodes, window of 512": ([1] * 256, 512),
    "256 spans of 5 rows": ([5] * 256, None),
    "256 decodes and a 2,048-row chunk": ([1] * 256 + [2048], None),
}
CALLS, NUM_SMS = 300, 132


def step(lengths: list[int]) -> StepRows:
    """Spans of so many rows, each behind 100 to 8,000 keys."""
    before = np.random.default_rng(0).integers(100, 8000, len(lengths))
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    row_seq = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    positions = (np.arange(bounds[-1]) - bounds[row_seq] + before[row_seq]).astype(np.int32)
    return StepRows(row_seq, positions, positions + 1, bounds)


def times_ms(rows: StepRows, window: int | None, calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        plan_step(rows, row_masks(rows, window), 4, 8, 128, 2, NUM_SMS)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def main() -> None:
    for name, (lengths, window) in STEPS.items():
        found = times_ms(step(lengths), window, CALLS)
        print(f"{name:<36} least {min(found):.3f} ms, median {statistics.median(found):.3f} ms")


if __name__ == "__main__":
    main()

"""Warm-up: a few steps of typical shapes, run on the empty pool and timed, to seed the scheduler's step-time model.

The keys that these steps read are whatever the pages hold; only time is measured and no answer is kept. Shapes go from
telling to less telling and stop when the time is up, so that a slow machine or a large model starts no later for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from scheduler.types import (
    Admission,
    Read,
    Request,
    Sampling,
    Span,
    StepFeatures,
    StepPlan,
    StepResult,
    StepSample,
)

PROFILE_S = 1.2
"""The profile starts no step that should end later than this many seconds after its own start."""
REPEATS = 2


class PoolShape(Protocol):
    """What of `WorkerInfo` the shapes must respect."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def model_len(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_seqs` sequences that each bring `num_rows` rows after `context` keys."""

    num_seqs: int
    num_rows: int
    context: int

    @property
    def tokens(self) -> int:
        return self.num_seqs * self.num_rows

    @property
    def features(self) -> StepFeatures:
        keys = self.context + self.num_rows
        if self.num_rows == 1:
            return StepFeatures(self.tokens, 0, self.num_seqs, self.num_seqs * keys, 0)
        read = self.num_rows * self.context + self.num_rows * (self.num_rows + 1) // 2
        return StepFeatures(self.tokens, self.tokens, 0, 0, self.num_seqs * read)


SHAPES = (
    Shape(1, 1, 32),
    Shape(1, 64, 0),
    Shape(8, 1, 32),
    Shape(1, 256, 0),
    Shape(32, 1, 64),
    Shape(1, 16, 0),
    Shape(16, 1, 256),
    Shape(1, 128, 0),
    Shape(1, 512, 0),
    Shape(64, 1, 128),
    Shape(1, 256, 1024),
    Shape(1, 1024, 0),
)


def measure_steps(
    run: Callable[[StepPlan], StepResult], pool: PoolShape, max_seqs: int, max_batched_tokens: int
) -> list[StepSample]:
    """Time the shapes that fit the limits, the better of `REPEATS` runs each; the very first run is not counted.

    Returns one sample per shape that there was time for, at least one.
    """
    started_at = time.perf_counter()
    samples: list[StepSample] = []
    slowest_s, most_tokens = 0.0, 1
    for number, shape in enumerate(SHAPES):
        if not _fits(shape, pool, max_seqs, max_batched_tokens):
            continue
        # A step's time grows much slower than its rows until arithmetic costs more than reading the weights.
        expected_s = REPEATS * slowest_s * max(1.0, shape.tokens / most_tokens) ** 0.5
        if time.perf_counter() - started_at + expected_s > PROFILE_S:
            continue
        if not samples:
            _time(run, shape, pool, first_step=-1, repeats=1)
        seconds = _time(run, shape, pool, first_step=-(number + 1) * (REPEATS + 2), repeats=REPEATS)
        slowest_s, most_tokens = max(slowest_s, seconds), max(most_tokens, shape.tokens)
        samples.append(StepSample(shape.features, seconds))
    return samples


def _fits(shape: Shape, pool: PoolShape, max_seqs: int, max_batched_tokens: int) -> bool:
    length = shape.context + shape.num_rows
    return (
        shape.num_seqs <= max_seqs
        and shape.tokens <= max_batched_tokens
        and length <= pool.model_len
        and shape.num_seqs * -(-length // pool.page_size) <= pool.num_pages
    )


def _time(run: Callable[[StepPlan], StepResult], shape: Shape, pool: PoolShape, first_step: int, repeats: int) -> float:
    """Seconds of one step of the shape, the best of `repeats`; its sequences are admitted before and released after."""
    ids = tuple(-1 - i for i in range(shape.num_seqs))
    length = shape.context + shape.num_rows
    per_seq = -(-length // pool.page_size)
    request = Request("profile", (0,) * length, 1, Sampling())
    spans = tuple(
        Span(
            seq_id,
            (0,) * shape.num_rows,
            shape.context,
            length,
            judged=(shape.num_rows - 1,),
            read=Read.SAMPLE,
        )
        for seq_id in ids
    )
    admitted = tuple(Admission(seq_id, request, request.prompt) for seq_id in ids)
    pages = tuple((seq_id, tuple(range(i * per_seq, (i + 1) * per_seq))) for i, seq_id in enumerate(ids))
    try:
        run(StepPlan(first_step, (), admitted, pages))
        return min(run(StepPlan(first_step + repeat + 1, spans)).elapsed_s for repeat in range(repeats))
    finally:
        run(StepPlan(first_step + repeats + 1, (), released=ids))

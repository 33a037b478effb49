"""Warm-up: a few steps of typical shapes, run on the empty pool and timed, to seed the scheduler's step-time model.

The keys that these steps read are whatever the pages hold; only time is measured and no answer is kept. Shapes go from
telling to less telling and stop when the time is up, so that a slow machine or a large model starts no later for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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

PROFILE_S = 1.5
"""The profile starts no step that should end later than this many seconds after its own start."""
REPEATS, MOST_REPEATS, REPEAT_S = 2, 8, 0.03
"""A shape runs twice, and on while it took less than this many seconds in all: a short step is easily disturbed."""
RECHECKED = 4
"""The first so many shapes are timed at every start."""
SAME_PACE = 1.5
"""A remembered profile is used if its first step, timed again, is within this factor of what it was."""


class PoolShape(Protocol):
    """What of `WorkerInfo` the shapes must respect."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def model_len(self) -> int: ...


class ProfileMemory(Protocol):
    """Where a profile outlives its process (`profile_memory.py`)."""

    def load(self) -> list[StepSample]:
        """The last profile of this model on this machine; empty if there is none."""
        ...

    def save(self, samples: Sequence[StepSample]) -> None: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_seqs` sequences that each bring `num_rows` rows after `context` keys; verified rows: a token and drafts."""

    num_seqs: int
    num_rows: int
    context: int
    is_verified: bool = False

    @property
    def tokens(self) -> int:
        return self.num_seqs * self.num_rows

    @property
    def features(self) -> StepFeatures:
        keys = self.context + self.num_rows
        if self.is_verified or self.num_rows == 1:
            drafts = self.num_seqs * (self.num_rows - 1)
            return StepFeatures(self.tokens, 0, self.num_seqs, self.num_seqs * keys, 0, drafts, drafts * keys)
        read = self.num_rows * self.context + self.num_rows * (self.num_rows + 1) // 2
        return StepFeatures(self.tokens, self.tokens, 0, 0, self.num_seqs * read, self.num_seqs)


SHAPES = (
    Shape(1, 1, 32),
    Shape(1, 64, 0),
    Shape(8, 1, 32),
    Shape(1, 8, 64, is_verified=True),
    Shape(1, 256, 0),
    Shape(8, 4, 64, is_verified=True),
    Shape(32, 1, 64),
    Shape(1, 16, 0),
    Shape(16, 1, 256),
    Shape(1, 128, 0),
    Shape(16, 8, 256, is_verified=True),
    Shape(1, 512, 0),
    Shape(64, 1, 128),
    Shape(1, 256, 1024),
    Shape(1, 1024, 0),
)


def measure_steps(
    run: Callable[[StepPlan], StepResult],
    pool: PoolShape,
    max_seqs: int,
    max_batched_tokens: int,
    memory: ProfileMemory | None = None,
) -> list[StepSample]:
    """Time the shapes that fit the limits, the best of a few runs each; the very first run is not counted.

    memory  of earlier starts: if the first shape takes now what it took then, the others are believed. The first few
            are timed again in any case and the better time stays: a neighbour may have been busy then
    Returns one sample per shape that is remembered or that there was time for, at least one.
    """
    shapes = [shape for shape in SHAPES if _fits(shape, pool, max_seqs, max_batched_tokens)]
    started_at = time.perf_counter()
    _time(run, shapes[0], pool, first_step=-3)
    samples: list[StepSample] = []
    known: dict[StepFeatures, float] = {}
    slowest_s, most_tokens = 0.0, 1
    for number, shape in enumerate(shapes):
        # A step's time grows much slower than its rows until arithmetic costs more than reading the weights.
        expected_s = REPEATS * slowest_s * max(1.0, shape.tokens / most_tokens) ** 0.5
        is_late = bool(samples) and time.perf_counter() - started_at + expected_s > PROFILE_S
        seconds = known.get(shape.features, math.inf)
        if not is_late and (number < RECHECKED or seconds == math.inf):
            measured_s = _time(run, shape, pool, first_step=-3 * (number + 2))
            slowest_s, most_tokens = max(slowest_s, measured_s), max(most_tokens, shape.tokens)
            if number == 0 and memory is not None:
                known = _believed(memory.load(), shape.features, measured_s)
                seconds = known.get(shape.features, math.inf)
            seconds = min(seconds, measured_s)
        if seconds < math.inf:
            samples.append(StepSample(shape.features, seconds))
    if memory is not None:
        memory.save(samples)
    return samples


def _believed(remembered: list[StepSample], features: StepFeatures, seconds: float) -> dict[StepFeatures, float]:
    """The remembered samples, if what they say of `features` agrees with what was measured now; else none."""
    known = {sample.features: sample.seconds for sample in remembered}
    then = known.get(features, math.inf)
    return known if 1 / SAME_PACE <= seconds / then <= SAME_PACE else {}


def _fits(shape: Shape, pool: PoolShape, max_seqs: int, max_batched_tokens: int) -> bool:
    length = shape.context + shape.num_rows
    return (
        shape.num_seqs <= max_seqs
        and shape.tokens <= max_batched_tokens
        and length <= pool.model_len
        and shape.num_seqs * -(-length // pool.page_size) <= pool.num_pages
    )


def _time(run: Callable[[StepPlan], StepResult], shape: Shape, pool: PoolShape, first_step: int) -> float:
    """Seconds of the shape's best step; its sequences are admitted before and released after."""
    ids = tuple(-1 - i for i in range(shape.num_seqs))
    length = shape.context + shape.num_rows
    per_seq = -(-length // pool.page_size)
    request = Request("profile", (0,) * (shape.context + 1 if shape.is_verified else length), 1, Sampling())
    judged = range(shape.num_rows) if shape.is_verified else range(shape.num_rows - 1, shape.num_rows)
    read = Read.VERIFY if shape.is_verified else Read.SAMPLE
    spans = tuple(
        Span(seq_id, (0,) * shape.num_rows, shape.context, length, judged=tuple(judged), read=read) for seq_id in ids
    )
    admitted = tuple(Admission(seq_id, request, request.prompt) for seq_id in ids)
    pages = tuple((seq_id, tuple(range(i * per_seq, (i + 1) * per_seq))) for i, seq_id in enumerate(ids))
    try:
        run(StepPlan(first_step, (), admitted, pages))
        step = StepPlan(first_step + 1, spans)
        times = [run(step).elapsed_s for _ in range(REPEATS)]
        while len(times) < MOST_REPEATS and sum(times) < REPEAT_S:
            times.append(run(step).elapsed_s)
        return min(times)
    finally:
        run(StepPlan(first_step + 2, (), released=ids))

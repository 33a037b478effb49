"""Random steps of every kind of span, for checks: plans that no scheduler made and every scheduler could make."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from scheduler.types import (
    Admission,
    Choice,
    Denoise,
    Diffusion,
    DiffusionModel,
    Read,
    Request,
    Sampling,
    Span,
    StepPlan,
    Topology,
)
from server.worker.batch import HostBatch, host_batch
from server.worker.kv_pool import pages_for
from server.worker.profile import PoolShape
from server.worker.recipe import make_recipe
from server.worker.sequences import SequenceState, make_sequences

KINDS = ("decode", "decode", "chunk", "chain", "tree", "denoise")
MOST_CONTEXT = 300
"""Most keys before a span."""
MOST_PAGES = 2000
"""Most pages that a step's sequences have together."""


class Bounds(PoolShape, Protocol):
    """What a step must respect; `WorkerInfo` has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def diffusion(self) -> DiffusionModel | None: ...


@dataclass(frozen=True)
class Space:
    """`Bounds` without a worker. Fields as in `WorkerInfo`."""

    num_pages: int
    page_size: int
    model_len: int
    vocab_size: int
    diffusion: DiffusionModel | None = None


def random_batches(generator: random.Random, bounds: Bounds, count: int, most_rows: int) -> Iterator[HostBatch]:
    """The rows of `random_plans`."""
    table = make_sequences(most_rows, bounds.model_len, bounds.num_pages, bounds.page_size)

    def state(new: Admission, slot: int, step: int) -> SequenceState:
        return SequenceState(new.request, make_recipe(new.request, ()), slot, list(new.tokens), step)

    for plan in random_plans(generator, bounds, count, most_rows):
        table.apply(plan, state)
        if plan.spans:
            states = [table[span.seq_id] for span in plan.spans]
            yield host_batch(plan.spans, states, table.page_table, bounds.page_size)


def random_plans(generator: random.Random, bounds: Bounds, count: int, most_rows: int) -> Iterator[StepPlan]:
    """Steps of 1 to `most_rows` rows, each of sequences of its own; the last plan only releases what is left.

    The keys before a span are whatever the pages hold. Denoised spans come where the model denoises block by
    block and a mask's own row answers for it.
    """
    released: tuple[int, ...] = ()
    for step in range(1, count + 1):
        plan = _random_plan(generator, step, bounds, generator.randint(1, most_rows), released)
        released = tuple(span.seq_id for span in plan.spans)
        yield plan
    yield StepPlan(count + 1, (), released=released)


def _random_plan(
    generator: random.Random, step: int, bounds: Bounds, num_rows: int, released: tuple[int, ...]
) -> StepPlan:
    diffusion = bounds.diffusion
    if diffusion is not None and (diffusion.topology is not Topology.BLOCK_CAUSAL or diffusion.shift):
        diffusion = None
    pages = generator.sample(range(bounds.num_pages), min(bounds.num_pages, MOST_PAGES))
    spans: list[Span] = []
    admitted: list[Admission] = []
    new_pages: list[tuple[int, tuple[int, ...]]] = []
    left = num_rows
    while left:
        span, request = _random_span(generator, step << 20 | len(spans), left, bounds, diffusion)
        needed = pages_for(span.kv_len, bounds.page_size)
        if needed > len(pages):
            break
        spans.append(span)
        admitted.append(Admission(span.seq_id, request, request.prompt))
        new_pages.append((span.seq_id, tuple(pages.pop() for _ in range(needed))))
        left -= len(span.tokens)
    return StepPlan(step, tuple(spans), tuple(admitted), tuple(new_pages), released)


def _random_span(
    generator: random.Random, seq_id: int, most_rows: int, bounds: Bounds, diffusion: DiffusionModel | None
) -> tuple[Span, Request]:
    """A span and a request whose prompt is all that comes before it and its first token."""
    kind = generator.choice(KINDS)
    if kind == "denoise" and (diffusion is None or diffusion.block_size > most_rows):
        kind = "decode"
    most_rows = min(most_rows, bounds.model_len // 2)
    length = {
        "decode": 1,
        "chunk": generator.randint(1, min(most_rows, 150)),
        "chain": generator.randint(1, min(most_rows, 9)),
        "tree": generator.randint(1, min(most_rows, 20)),
        "denoise": diffusion.block_size if diffusion else 1,
    }[kind]
    start = generator.randint(0, min(MOST_CONTEXT, bounds.model_len - length))
    if kind == "denoise" and diffusion:
        start -= start % diffusion.block_size
    tokens = tuple(generator.randrange(bounds.vocab_size) for _ in range(length))
    before = tuple(generator.randrange(bounds.vocab_size) for _ in range(start))
    request = Request(f"random {seq_id}", (*before, tokens[0]), 64, _random_sampling(generator))
    everything = tuple(range(length))
    if kind in ("decode", "chunk"):
        span = Span(seq_id, tokens, start, start + length, judged=everything[-1:], read=Read.SAMPLE)
    elif kind == "denoise" and diffusion:
        request = Request(
            request.id, before or tokens[:1], 64, request.sampling, decoding=Diffusion("check", Choice("sequential"))
        )
        masked = tuple(token if generator.random() < 0.5 else diffusion.mask_id for token in tokens[:-1])
        masked += (diffusion.mask_id,)
        at = tuple(place for place, token in enumerate(masked) if token == diffusion.mask_id)
        block = Denoise(start, start + length, 0, 1, (start, start + length))
        span = Span(seq_id, masked, start, start + length, diffusion.block_size, at, Read.DENOISE, denoise=block)
    else:
        parents = (-1, *(generator.randrange(node) for node in range(1, length))) if kind == "tree" else ()
        span = Span(seq_id, tokens, start, start + length, judged=everything, read=Read.VERIFY, parents=parents)
    return span, request


def _random_sampling(generator: random.Random) -> Sampling:
    if generator.random() < 0.3:
        return Sampling(temperature=0.0)
    return Sampling(
        temperature=generator.choice([0.7, 1.0]),
        top_p=generator.choice([1.0, 0.9]),
        top_k=generator.choice([-1, 40]),
        frequency_penalty=generator.choice([0.0, 0.5]),
        seed=generator.randrange(1 << 31),
        logprobs=generator.choice([None, 3]),
    )

"""Steps that a worker runs before it serves: the largest there can be, and one for every kernel that there is.

No answer is kept and the keys that these steps read are whatever the pages hold, so their sequences share pages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from kernels.ops import Ops
from scheduler.types import MAX_TREE_NODES, Admission, Read, Request, Sampling, Span, StepPlan, StepResult
from server.worker.info import WorkerInfo
from server.worker.kv_pool import KVPool, pages_for
from server.worker.random_steps import random_plans

_LONG = 128
"""Rows of a span that any back end takes for a prompt."""
_RANDOM_STEPS = 16
_SHARED_KEYS = 8192
_SHARERS = (4, 64)
"""Sequences that share so many keys: few rows and many, so that reading the keys once pays in small and large tiles."""


class _Piece(NamedTuple):
    """A sequence of a step: `num_rows` rows behind `start` keys."""

    num_rows: int
    start: int = 0
    sampling: Sampling = Sampling(temperature=0.0)
    is_judged: bool = False
    is_tree: bool = False
    num_drafts: int = 0


def largest_steps(info: WorkerInfo, max_seqs: int, max_batched_tokens: int) -> Iterator[StepPlan]:
    """The steps that take most memory: all rows prompts with log-probabilities, all sequences with every rule."""
    num_top = min(20, info.vocab_size)
    length = min(info.model_len, max_batched_tokens)
    whole, rest = divmod(max_batched_tokens, length)
    prompt = Sampling(temperature=0.0, prompt_logprobs=num_top)
    sizes = [length] * whole + [rest] * (rest > 0)
    rules = Sampling(
        top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=num_top
    )  # fmt: skip
    yield from _steps(
        info,
        [
            [_Piece(size, 0, prompt, is_judged=True) for size in sizes],
            [_Piece(1, 0, rules)] * min(max_seqs, max_batched_tokens),
        ],
    )


def kernel_steps(info: WorkerInfo, max_seqs: int, max_batched_tokens: int) -> Iterator[StepPlan]:
    """Steps that between them run every kernel in every form that a step may ask for.

    Attention chooses its form by the longest of the short spans, whether any span is long, whether any is a tree, and
    whether spans share so many keys that these are read once for all.
    """
    most = min(max_batched_tokens, info.model_len)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, MAX_TREE_NODES) if size <= most]
    drafts = 4 if any(is_model for _, is_model in info.drafters) else 0
    steps = [[_Piece(size, is_tree=is_tree)] for size in sizes for is_tree in (False, True)]
    steps.append([_Piece(1, 0, Sampling(temperature=1.0), num_drafts=drafts)])
    if most > _LONG:
        steps += [[_Piece(_LONG)], [_Piece(1, is_tree=True), _Piece(_LONG)]]
    shared = min(info.model_len, info.num_pages * info.page_size, _SHARED_KEYS) - 1
    steps += [[_Piece(1, shared)] * min(num, most, max_seqs) for num in _SHARERS]
    yield from _steps(info, steps)
    yield from random_plans(random.Random(0), info, _RANDOM_STEPS, most)


def run_kernels(
    run: Callable[[StepPlan], StepResult],
    ops: Ops,
    pool: KVPool,
    info: WorkerInfo,
    max_seqs: int,
    max_batched_tokens: int,
) -> None:
    """`kernel_steps`, and the one operation that no step is sure to need."""
    for plan in kernel_steps(info, max_seqs, max_batched_tokens):
        run(plan)
    nowhere = torch.full((1,), pool.spare_page * pool.page_size, device=pool.device)
    for k_pages, v_pages in pool.layers[:1]:
        ops.move_kv(k_pages, v_pages, nowhere, nowhere)


def _steps(info: WorkerInfo, steps: Sequence[Sequence[_Piece]]) -> Iterator[StepPlan]:
    """A plan for each, which releases the sequences of the one before, and one that releases the last ones."""
    released: tuple[int, ...] = ()
    for number, pieces in enumerate(steps):
        spans, admitted, new_pages = list[Span](), list[Admission](), list[tuple[int, tuple[int, ...]]]()
        for place, piece in enumerate(pieces):
            seq_id, length, start = -1 - place, piece.num_rows, piece.start
            is_verified = piece.is_tree or (1 < length <= MAX_TREE_NODES and not piece.is_judged)
            request = Request("warm-up", (0,) * (1 if is_verified else start + length), 64, piece.sampling)
            judged = range(length) if is_verified or piece.is_judged else range(length - 1, length)
            parents = tuple(range(-1, length - 1)) if piece.is_tree else ()
            read = Read.VERIFY if is_verified else Read.SAMPLE
            tokens = (0,) * length
            spans.append(Span(seq_id, tokens, start, start + length, 1, tuple(judged), read, parents, piece.num_drafts))
            admitted.append(Admission(seq_id, request, request.prompt))
            new_pages.append((seq_id, tuple(range(pages_for(start + length, info.page_size)))))
        depth = max(piece.num_drafts for piece in pieces)
        yield StepPlan(-1 - number, tuple(spans), tuple(admitted), tuple(new_pages), released, draft_depth=depth)
        released = tuple(span.seq_id for span in spans)
    yield StepPlan(-1 - len(steps), (), released=released)

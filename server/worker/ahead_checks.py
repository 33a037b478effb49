"""Checks for a GPU: steps launched ahead give the tokens of steps that wait, and no launch waits for the device.

A worker's plans without a scheduler: some sequences, their prompts in one step, then decodes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count

import torch

from scheduler.types import UNKNOWN, Admission, Read, Request, Sampling, Span, StepPlan, StepResult
from server.worker.kv_pool import pages_for
from server.worker.worker import Worker

RULES = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_p=0.9, top_k=40),
    Sampling(temperature=1.2, min_p=0.02, logit_bias=((5, 2.0),)),
    Sampling(temperature=1.0, min_tokens=8),
    Sampling(temperature=1.0, allowed_token_ids=tuple(range(5, 30))),
)
"""All that can be followed ahead."""
MOST_PROMPT = 40


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Inside, whatever waits for the CUDA device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def ahead_checks(
    worker: Worker,
    num_seqs: int,
    num_steps: int,
    seed: int = 2,
    guard: Callable[[], AbstractContextManager[None]] = no_wait,
) -> list[tuple[str, bool]]:
    """The worker plans ahead and knows no sequence. guard: fails where a launch inside it waits."""
    crowd = _Crowd(worker, num_seqs, num_steps, random.Random(seed))
    waiting = crowd.decode(is_ahead=False)
    num_waits = 0
    try:
        ahead = crowd.decode(is_ahead=True, guard=guard)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        num_waits, ahead = 1, []
    num_different = sum(one != other for one, other in zip(waiting, ahead, strict=False)) if ahead else num_seqs
    return [
        (
            f"{num_different} of {num_seqs} sequences differ when {num_steps} steps are launched ahead",
            not num_different,
        ),
        (f"{'a launch waits' if num_waits else 'no launch waits'} for the device", not num_waits),
    ]


class _Crowd:
    def __init__(self, worker: Worker, num_seqs: int, num_steps: int, rng: random.Random) -> None:
        info, self._worker, self._num_steps = worker.info, worker, num_steps
        num_pages = pages_for(MOST_PROMPT + num_steps + 1, info.page_size)
        if num_pages * num_seqs > info.num_pages:
            raise ValueError(f"{num_seqs} sequences of {num_pages} pages do not fit in {info.num_pages}")
        pages = iter(range(info.num_pages))
        self._pages = [tuple(next(pages) for _ in range(num_pages)) for _ in range(num_seqs)]
        self._requests = []
        for number in range(num_seqs):
            prompt = tuple(rng.randrange(5, info.vocab_size) for _ in range(rng.randint(1, MOST_PROMPT)))
            sampling = replace(RULES[number % len(RULES)], seed=rng.getrandbits(60))
            self._requests.append(Request(f"check-{number}", prompt, num_steps + 2, sampling))
        self._ids, self._steps = count(1 << 20), count(1 << 20)

    def decode(
        self, is_ahead: bool, guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> list[list[int]]:
        """The tokens of each sequence. The first two steps are not guarded: what is allocated for good is so then."""
        ids = [next(self._ids) for _ in self._requests]
        tokens: list[list[int]] = [[] for _ in ids]
        finish = self._worker.launch(self._prompts(ids))
        for number in range(self._num_steps):
            if is_ahead:
                with guard() if number > 1 else contextlib.nullcontext():
                    then = self._worker.launch(self._decodes(ids, number, None))
                _take(finish(), tokens)
            else:
                _take(finish(), tokens)
                then = self._worker.launch(self._decodes(ids, number, tokens))
            finish = then
        _take(finish(), tokens)
        self._worker.run(StepPlan(next(self._steps), (), released=tuple(ids)))
        return tokens

    def _prompts(self, ids: list[int]) -> StepPlan:
        admitted = tuple(Admission(i, request, request.prompt) for i, request in zip(ids, self._requests, strict=True))
        spans = []
        for new in admitted:
            size = len(new.tokens)
            spans.append(Span(new.seq_id, new.tokens, 0, size, judged=(size - 1,), read=Read.SAMPLE))
        return StepPlan(next(self._steps), tuple(spans), admitted, tuple(zip(ids, self._pages, strict=True)))

    def _decodes(self, ids: list[int], number: int, tokens: list[list[int]] | None) -> StepPlan:
        step, spans = next(self._steps), []
        for place, (seq_id, request) in enumerate(zip(ids, self._requests, strict=True)):
            start = len(request.prompt) + number
            token = UNKNOWN if tokens is None else tokens[place][-1]
            spans.append(Span(seq_id, (token,), start, start + 1, judged=(0,), read=Read.SAMPLE))
        return StepPlan(step, tuple(spans), after=step - 1 if tokens is None else None)


def _take(result: StepResult, tokens: list[list[int]]) -> None:
    for outcome, known in zip(result.outcomes, tokens, strict=True):
        known.extend(outcome.tokens)

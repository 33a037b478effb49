"""The two load generators: a closed loop keeps `concurrency` requests in flight, an open loop sends at a Poisson rate.

A closed loop measures capacity (it slows down with the server); an open loop measures what users see at a given demand,
queueing included. Requests are sent when they are due, however many are still unanswered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from server.bench.client import Sample, Target, stream
from server.bench.workload import Server, Workload, arrival_times, request_body


async def closed_loop(
    target: Target,
    workload: Workload,
    server: Server,
    prompts: Sequence[str | list[int]],
    concurrency: int,
    timeout_s: float,
    bar: tqdm[Any] | None = None,
) -> list[Sample]:
    """Send every prompt, `concurrency` at a time. Interrupted, it returns what has finished."""
    remaining = iter(prompts)
    samples: list[Sample] = []

    async def worker() -> None:
        for prompt in remaining:
            body = request_body(workload, server.model, prompt)
            samples.append(await stream(target, workload.path, body, timeout_s))
            advance(bar, samples)

    await _all(asyncio.create_task(worker()) for _ in range(min(concurrency, len(prompts))))
    return samples


async def open_loop(
    target: Target,
    workload: Workload,
    server: Server,
    prompts: Sequence[str | list[int]],
    rate: float,
    timeout_s: float,
    bar: tqdm[Any] | None = None,
) -> list[Sample]:
    """Send the prompts at Poisson times of `rate` per second. Interrupted, it returns what has finished."""
    samples: list[Sample] = []
    start = time.perf_counter()

    async def one(prompt: str | list[int], due: float) -> None:
        await asyncio.sleep(start + due - time.perf_counter())
        body = request_body(workload, server.model, prompt)
        samples.append(await stream(target, workload.path, body, timeout_s))
        advance(bar, samples)

    times = arrival_times(len(prompts), rate, workload.seed)
    await _all(asyncio.create_task(one(prompt, due)) for prompt, due in zip(prompts, times, strict=True))
    return samples


def advance(bar: tqdm[Any] | None, samples: Sequence[Sample]) -> None:
    if bar is not None:
        failed = sum(1 for sample in samples if not sample.is_complete)
        if failed:
            bar.set_postfix_str(f"{failed} failed", refresh=False)
        bar.update()


async def _all(tasks: Iterable[asyncio.Task[None]]) -> None:
    started = list(tasks)
    try:
        await asyncio.gather(*started)
    except asyncio.CancelledError:
        # Ctrl-C: the report of what was measured so far is worth more than the trace.
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)

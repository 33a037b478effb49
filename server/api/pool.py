"""Slow text work off the event loop: a few threads and a bounded queue in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.api.errors import ApiError, overloaded
from server.metrics import Metrics

Result = TypeVar("Result")

INLINE_BYTES = 4096
"""Work on less text than this takes well under a millisecond and is cheaper done on the spot than handed over."""


class _Refused:
    def __init__(self, error: ApiError) -> None:
        self.error = error


def _caught(function: Callable[[], Result]) -> Result | _Refused:
    """Runs in a worker. A refusal leaves without its traceback, whose frames hold the body: freeing a million values
    is a worker's job too, and must not wait for the garbage collector."""
    try:
        return function()
    except ApiError as error:
        error.__cause__ = error.__context__ = None
        return _Refused(error.with_traceback(None))


class TextPool:
    """`run` gives the function's result; more than `max_waiting` jobs at once are refused with 429.

    A cancelled job that has not begun never runs and leaves its place at once; one that runs ends by itself, since its
    input is bounded.
    """

    def __init__(self, num_threads: int, max_waiting: int, metrics: Metrics) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="text")
        self._max_jobs = num_threads + max_waiting
        self._num_jobs = 0
        self._metrics = metrics

    async def run(self, size_bytes: int, function: Callable[[], Result]) -> Result:
        if size_bytes <= INLINE_BYTES:
            return function()
        if self._num_jobs >= self._max_jobs:
            self._metrics.count_rejection("text_queue")
            raise overloaded("too many long texts are waiting to be tokenized; try again shortly", 1)
        self._num_jobs += 1
        try:
            outcome = await asyncio.get_running_loop().run_in_executor(self._executor, _caught, function)
        finally:
            self._num_jobs -= 1
        if isinstance(outcome, _Refused):
            raise outcome.error
        return outcome

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

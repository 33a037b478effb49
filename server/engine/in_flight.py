"""One request as the front end knows it: its stream of deltas, and all it takes to go on after an engine crash.

The engine keeps nothing that matters: prompt, emitted tokens, sampling and seed are here, noise is keyed by position
(R5) and KV is a function of the tokens (R4), so a resubmitted request continues exactly where its stream stopped.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from scheduler.types import Delta, Request, RequestTimes
from server.engine.coalesce import merge


class DeltaStream:
    """The deltas of one request, in order; ends after the one with a finish reason.

    A slow consumer loses nothing and delays nobody: what it has not taken is merged into one delta. Cancelling the task
    that waits here, `aclose()`, and dropping the stream unfinished all abort the request.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._pending: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._is_complete = False
        self._is_closed = False

    def put(self, delta: Delta) -> None:
        """For the client alone: news, or the end."""
        if self._is_closed or self._is_complete:
            return
        self._pending.append(delta)
        self._is_complete = delta.finish_reason is not None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._pending:
            if self._is_complete or self._is_closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.close()
                raise
            finally:
                self._waiter = None
        delta = merge(self._pending)
        self._pending = []
        return delta

    def close(self) -> None:
        """Abort unless the request has ended. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pending = []
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if not self._is_complete:
            self._abort(self.request_id)

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed and not self._is_complete:
            self.close()


class InFlight:
    """What the client holds of a request that has not ended. Seconds are of the client's own clock."""

    def __init__(self, request: Request, stream: DeltaStream, now: float) -> None:
        self._request = request
        # Weak, so that a stream its consumer has dropped ends.
        self._stream = weakref.ref(stream)
        self._submitted_at = now
        self._tokens: list[int] = []
        self._num_prompt_logprobs = 0
        self._num_repeated = 0
        self._has_cached_tokens = False
        self._lost_queue_s = 0.0
        self._lost_decode_s = 0.0
        self.num_crashes = 0

    @property
    def request(self) -> Request:
        return self._request

    def absorb(self, delta: Delta) -> None:
        """Note what is out, and pass it on without what a resubmission repeats."""
        repeated = min(self._num_repeated, len(delta.prompt_logprobs))
        self._num_repeated -= repeated
        cached = None if self._has_cached_tokens else delta.cached_tokens
        self._tokens.extend(delta.tokens)
        self._num_prompt_logprobs += len(delta.prompt_logprobs) - repeated
        self._has_cached_tokens |= delta.cached_tokens is not None
        if self.num_crashes:
            delta = replace(
                delta,
                prompt_logprobs=delta.prompt_logprobs[repeated:],
                cached_tokens=cached,
                times=self._total(delta.times),
            )
            if not (delta.tokens or delta.prompt_logprobs or delta.finish_reason or cached is not None) and (
                delta.decoding is None and delta.snapshot is None
            ):
                return
        if (stream := self._stream()) is not None:
            stream.put(delta)

    def note_crash(self, now: float) -> None:
        """The engine died with this request in it."""
        self.num_crashes += 1
        self._num_repeated = self._num_prompt_logprobs
        lost_s, self._submitted_at = now - self._submitted_at, now
        if self._tokens:
            self._lost_decode_s += lost_s
        else:
            self._lost_queue_s += lost_s

    def resubmission(self, now: float) -> Request:
        """The request that continues this one in a new engine; `now` ends the time lost to the restart."""
        lost_s, self._submitted_at = now - self._submitted_at, now
        if self._tokens:
            self._lost_decode_s += lost_s
        else:
            self._lost_queue_s += lost_s
        return replace(self._request, output=self._request.output + tuple(self._tokens))

    def _total(self, times: RequestTimes | None) -> RequestTimes | None:
        if times is None:
            return None
        return replace(times, queue_s=times.queue_s + self._lost_queue_s, decode_s=times.decode_s + self._lost_decode_s)

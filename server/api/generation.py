"""One client call in flight: its requests in the engine, its choices, its client's patience.

`take` gives the pieces that are there. Whatever ends the call (a fault, the client's leaving, a deadline) is raised by
`take`; whatever happens, `close` aborts what still runs and gives the permit back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

from starlette.types import Receive

from scheduler.types import DecodingUsage, Delta, Fault, FinishReason, SpeculationMode, SpeculationUsage
from server.api.admission import Permit
from server.api.attention import attention_usage
from server.api.body import ClientGone
from server.api.choice import Choice, Piece
from server.api.decoding import decoding_usage, show_snapshot
from server.api.errors import ApiError
from server.api.grammar import grammar_field
from server.api.services import Services, Stream
from server.api.speculation import speculation_usage
from server.api.validation import Call
from server.engine.client import EngineUnavailable
from server.metrics import FinishedRequest

logger = logging.getLogger(__name__)


class Generation:
    """Runs a call. Use as `async with Generation(...) as generation`, on one task."""

    def __init__(self, services: Services, call: Call, permit: Permit, receive: Receive, started_at: float) -> None:
        self.call = call
        self.choices = [Choice(i, call, services.tokenizer) for i in range(len(call.requests))]
        self._services, self._permit, self._receive = services, permit, receive
        self._metrics = services.metrics
        self._started_at = started_at
        self._pieces: list[Piece] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._num_left = len(self.choices)
        self._has_output = False

    async def __aenter__(self) -> Generation:
        try:
            for request in self.call.requests:
                self._streams.append(self._services.engine.generate(request))
        except EngineUnavailable as error:
            self.close()
            self._metrics.count_rejection("unavailable")
            retry_after = None if error.retry_after_s is None else max(1, round(error.retry_after_s))
            raise ApiError(503, str(error), retry_after=retry_after) from error
        except BaseException:
            self.close()
            raise
        loop = asyncio.get_running_loop()
        self._metrics.observe_admitted(
            self.call.num_prompt_tokens,
            self.call.checked.body.n,
            self._services.admission.num_requests,
            self.call.checked.attention,
            self.call.checked.prompt_attention,
        )
        self._note_undrafted()
        self._tasks = [loop.create_task(self._pump(*pair)) for pair in zip(self.choices, self._streams, strict=True)]
        self._tasks.append(loop.create_task(self._watch_client()))
        self._deadline = loop.call_later(self._services.settings.timeouts.request_s, self._expire)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def is_denoised(self) -> bool:
        return self.call.checked.decoding is not None

    @property
    def is_finished(self) -> bool:
        return self._num_left == 0 and not self._pieces

    async def take(self, timeout_s: float | None = None) -> list[Piece]:
        """The pieces since the last call, at least one; none after `timeout_s` of silence.

        Raises ApiError (the engine's fault, a deadline) or ClientGone.
        """
        if not self._pieces and self._failure is None and self._num_left:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter
            except TimeoutError:
                return []
            finally:
                self._waiter = None
        if self._failure is not None:
            raise self._failure
        pieces, self._pieces = self._pieces, []
        return pieces

    def close(self, cause: str | None = None) -> None:
        """Abort what still runs, stop the tasks, give the permit back. Idempotent."""
        if cause is None and isinstance(self._failure, ClientGone):
            cause = "client"
        if self._num_left and cause is not None:
            self._metrics.count_abort("running" if self._has_output else "waiting", cause)
        self._num_left = 0
        if self._deadline is not None:
            self._deadline.cancel()
        for stream in self._streams:
            stream.close()
        for task in self._tasks:
            task.cancel()
        self._permit.release()

    def usage(self) -> dict[str, object]:
        """Prompt tokens once per prompt, completion tokens and drafts of every choice."""
        checked = self.call.checked
        n = checked.body.n
        num_prompt = self.call.num_prompt_tokens
        num_output = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.cached_tokens or 0 for choice in self.choices[::n])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": cached},
            **speculation_usage(
                checked.body,
                bool(self._services.info.drafters) and not self.is_denoised,
                sum((choice.speculation for choice in self.choices), start=SpeculationUsage()),
            ),
            **(decoding_usage(self._denoising(), num_output) if self.is_denoised else {}),
            **attention_usage(checked.body, checked.attention, checked.prompt_attention),
        }

    def _denoising(self) -> DecodingUsage:
        return sum((choice.decoding for choice in self.choices), start=DecodingUsage())

    def shown_snapshot(self, piece: Piece) -> dict[str, Any]:
        """The block of a piece that has one, for whoever watches."""
        diffusion = self._services.info.diffusion
        assert diffusion is not None
        assert piece.snapshot is not None
        num_prompt = len(self.choices[piece.index].prompt.ids)
        return show_snapshot(piece.snapshot, piece.index, num_prompt, diffusion.mask_id, self._services.tokenizer)

    async def _pump(self, choice: Choice, stream: Stream) -> None:
        first_s = last_s = None
        try:
            while not choice.is_finished:
                delta = await stream.__anext__()
                if delta.fault is not None or delta.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                    fault = delta.fault
                    if fault is not None and fault.param == "response_format":
                        fault = replace(fault, param=grammar_field(self.call.checked.body))
                    self._fail(self._as_api_error(fault, choice.request.id))
                    return
                if self.is_denoised:
                    self._metrics.observe_denoised(delta.decoding, len(delta.tokens))
                if delta.tokens:
                    now = time.monotonic()
                    if first_s is None or last_s is None:
                        first_s = now
                        self._note_first(choice, now)
                    else:
                        self._metrics.observe_gap(now - last_s, len(delta.tokens))
                    last_s = now
                piece = choice.absorb(delta)
                if choice.is_finished:
                    self._num_left -= 1
                    self._note_finished(choice, piece, delta, first_s, last_s)
                    stream.close()  # a stop string ends the request before the engine does
                if piece is not None:
                    self._pieces.append(piece)
                    self._wake()
        except StopAsyncIteration:
            self._fail(ApiError(500, "the engine ended the request without a reason"))
        except Exception:
            logger.exception("request %s failed on its way to text", choice.request.id)
            self._fail(ApiError(500, "internal error while producing the text"))

    def _note_undrafted(self) -> None:
        if self.is_denoised:
            return
        if not self._services.info.drafters:
            self._metrics.count_undrafted("server")
        elif self.call.requests[0].speculation.mode is SpeculationMode.OFF:
            self._metrics.count_undrafted("request")

    def _note_first(self, choice: Choice, now: float) -> None:
        self._has_output = True
        self._metrics.observe_first_token(now - self._started_at)
        if choice.index % self.call.checked.body.n == 0:
            self._permit.settle(max(0, self._permit.num_tokens - len(choice.prompt.ids)))

    def _note_finished(
        self, choice: Choice, piece: Piece | None, delta: Delta, first_s: float | None, last_s: float | None
    ) -> None:
        reason = FinishReason.STOP if piece is None or piece.finish_reason is None else piece.finish_reason
        self._metrics.observe_finished(
            FinishedRequest(
                reason=reason,
                num_prompt=len(choice.prompt.ids),
                num_generated=choice.num_tokens,
                max_tokens=choice.request.max_tokens,
                e2e_s=time.monotonic() - self._started_at,
                first_token_s=first_s,
                last_token_s=last_s,
                times=delta.times,
                decoding=choice.decoding if self.is_denoised else None,
            )
        )

    def _as_api_error(self, fault: Fault | None, request_id: str) -> ApiError:
        error = as_api_error(fault, request_id)
        if error.code == "timeout" and self._failure is None:
            self._metrics.count_abort("waiting", "timeout")
            error.retry_after = self._services.admission.retry_after(len(self.choices))
        return error

    async def _watch_client(self) -> None:
        """The body has been read, so the next message is the client's leaving."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientGone())

    def _expire(self) -> None:
        seconds = self._services.settings.timeouts.request_s
        self._metrics.count_abort("running" if self._has_output else "waiting", "timeout")
        self._fail(ApiError(504, f"the request took longer than {seconds:g} s", code="timeout"))

    def _fail(self, failure: Exception) -> None:
        if self._failure is None and self._num_left:
            self._failure = failure
            for stream in self._streams:
                stream.close()
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def as_api_error(fault: Fault | None, request_id: str) -> ApiError:
    """The engine's fault for the client: 4xx as they are, ours in fixed words (details go to the log)."""
    if fault is None:
        return ApiError(503, "the request was aborted by the server", retry_after=2)
    if fault.status < 500:
        retry_after = 2 if fault.status == 429 else None
        return ApiError(fault.status, fault.message, fault.param, retry_after=retry_after)
    if fault.status == 503 and fault.code is not None:
        return ApiError(503, fault.message, fault.param, fault.code, retry_after=2)
    logger.error("request %s failed with %d: %s", request_id, fault.status, fault.message)
    if fault.status == 503:
        return ApiError(503, "the engine is not available", retry_after=2)
    return ApiError(500, "the engine failed while working on this request")

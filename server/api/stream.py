"""Server-sent events: framing, the constant parts of chunks, the writing loop.

At 32 streams x 100 steps a second this is the front end's inner loop: no models, one JSON encoding per text, several
events per write. A stream's status is fixed once its head is sent, so the head waits for the first piece.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from typing import Any, Protocol

from starlette.types import Send

from server.api.body import ClientGone
from server.api.choice import Piece
from server.api.errors import ApiError
from server.api.generation import Generation
from server.api.settings import Timeouts

logger = logging.getLogger(__name__)

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
OBFUSCATION_UNIT = 64

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Form(Protocol):
    """How one route writes its answer."""

    def choices(self, piece: Piece) -> list[str]:
        """The JSON of `choices[0]` of each chunk that `piece` becomes."""
        ...

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed; `pieces` in order of arrival."""
        ...


class Envelope:
    """The constant parts of an answer: what surrounds the choices in chunks and whole answers."""

    def __init__(self, answer_id: str, kind: str, created: int, model: str, fingerprint: str | None) -> None:
        self.fields: dict[str, Any] = {"id": answer_id, "object": kind, "created": created, "model": model}
        if fingerprint is not None:
            self.fields["system_fingerprint"] = fingerprint
        self._head = "data: " + to_json(self.fields)[:-1] + ',"choices":['

    def event(self, choice: str, usage: str | None, is_padded: bool = False) -> bytes:
        """One chunk. `usage` is its JSON, or None to leave the key out; padding evens out event sizes (S-58)."""
        text = f"{self._head}{choice}]" + ("" if usage is None else f',"usage":{usage}')
        if is_padded:
            size = len(text.encode()) + len(',"obfuscation":""')
            padding = secrets.token_hex(OBFUSCATION_UNIT)[: -size % OBFUSCATION_UNIT]
            text += f',"obfuscation":"{padding}"'
        return (text + "}\n\n").encode()


def snapshot_event(snapshot: dict[str, Any]) -> bytes:
    """An event of a type of its own: clients of the ordinary chunks do not see it."""
    return f"event: snapshot\ndata: {to_json(snapshot)}\n\n".encode()


async def write_stream(generation: Generation, form: Form, envelope: Envelope, send: Send, timeouts: Timeouts) -> None:
    """Stream a call to its end. Raises ApiError only before the head is sent; a later fault is an event."""
    pieces = await generation.take(timeouts.first_token_s)
    writer = _Writer(generation, form, envelope, send, timeouts.write_s)
    try:
        await writer.start()
        while True:
            await writer.write(pieces)
            if generation.is_finished:
                break
            pieces = await generation.take(timeouts.keep_alive_s)
        await writer.finish()
    except ApiError as error:
        await writer.fail(error)
    except TimeoutError:
        logger.info("a reader did not read for %g s; its request is aborted", timeouts.write_s)
        generation.close("slow_reader")
    except ClientGone:
        pass


class _Writer:
    def __init__(
        self, generation: Generation, form: Form, envelope: Envelope, send: Send, write_timeout_s: float
    ) -> None:
        self._generation, self._form, self._envelope = generation, form, envelope
        self._send, self._write_timeout_s = send, write_timeout_s
        options = generation.call.checked.body.stream_options
        self._with_usage = options is not None and options.include_usage
        self._continuous = options is not None and options.continuous_usage_stats
        self._is_padded = options is not None and options.include_obfuscation

    async def start(self) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    async def write(self, pieces: list[Piece]) -> None:
        if not pieces:
            await self._write(KEEP_ALIVE)
            return
        events = []
        for piece in pieces:
            if piece.snapshot is not None:
                events.append(snapshot_event(self._generation.shown_snapshot(piece)))
            if not piece.is_chunk:
                continue
            usage = self._usage_of(piece)
            for choice in self._form.choices(piece):
                events.append(self._envelope.event(choice, usage, self._is_padded))
        await self._write(b"".join(events))

    async def finish(self) -> None:
        usage = self._envelope.event("", to_json(self._generation.usage())) if self._with_usage else b""
        await self._write(usage + DONE)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError) -> None:
        await self._write(f"data: {to_json(error.body())}\n\n".encode() + DONE)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _usage_of(self, piece: Piece) -> str | None:
        if self._continuous:
            num_prompt = len(self._generation.choices[piece.index].prompt.ids)
            count = piece.num_tokens
            total = num_prompt + count
            return f'{{"prompt_tokens":{num_prompt},"completion_tokens":{count},"total_tokens":{total}}}'
        return "null" if self._with_usage else None

    async def _write(self, data: bytes) -> None:
        async with asyncio.timeout(self._write_timeout_s):
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

"""HTTP/1.1 connections as the server keeps them: uvicorn's h11 protocol with the limits that it leaves to a proxy.

A client cannot hold a connection without a request (slow or endless heads), without reading its answer, or keep the
event loop busy with a body in crumbs; what is not HTTP gets the error object like any other mistake. Which requests are
good is not decided here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

FREE_PIECES, MIN_PIECE_BYTES = 1024, 64
"""A body may come in this many pieces of any size, and beyond them in pieces of this mean size: each costs the loop
about 15 us, so that 2 MiB in chunks of one byte would cost it half a minute."""

MAX_PIPELINED_BYTES = 1 << 16

ERRORS = {
    400: ("invalid_request_error", "this is not a valid HTTP/1.1 request", "invalid_http"),
    413: ("invalid_request_error", "the body comes in too many small pieces", "request_too_large"),
    431: ("invalid_request_error", "the request's head is larger than this server takes", "headers_too_large"),
    503: ("server_error", "too many connections are open; try again shortly", "too_many_connections"),
}

REASONS = {400: b"Bad Request", 413: b"Content Too Large", 431: b"Request Header Fields Too Large"}


class BoundedConnection(h11.Connection):
    """h11's state machine, which remembers why it failed and counts the pieces of a body."""

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self.status = 400
        self._num_pieces = self._num_bytes = 0

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.status = error.error_status_hint if error.error_status_hint in ERRORS else 400
            raise
        if isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > FREE_PIECES + self._num_bytes // MIN_PIECE_BYTES:
                self.status = 413
                raise h11.RemoteProtocolError("too many small pieces", 413)
        elif isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        return event


class PatientProtocol(H11Protocol):
    """One connection.

    header_s         for the head of a first request; further ones may come `timeout_keep_alive` later
    write_s          a reader that takes nothing for so long loses the connection
    max_connections  those beyond it get a 503, but for health probes
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        header_s: float,
        write_s: float,
        max_connections: int,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = BoundedConnection(config.h11_max_incomplete_event_size or 1 << 16)
        self._header_s, self._write_s, self._max_connections = header_s, write_s, max_connections
        self._tick_s = min(1.0, header_s / 4, write_s / 4)
        self._tick: asyncio.TimerHandle | None = None
        self._waits_since = self.loop.time()
        self._unread_bytes = 0
        self._seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self.app = _Crowded(self.app)
        self._tick = self.loop.call_later(self._tick_s, self._watch)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._tick is not None:
            self._tick.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """As uvicorn's, but a next request on the wire does not end the reading: its client may leave."""
        super().handle_events()
        waits = self.flow.read_paused and self.conn.their_state is h11.DONE
        if waits and len(self.conn.trailing_data[0]) <= MAX_PIPELINED_BYTES:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, if there is still an answer to give; close in any case."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = self.conn.status if isinstance(self.conn, BoundedConnection) else 400
            body = error_body(status)
            headers = [*error_headers(body), ("x-should-retry", "false")]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=REASONS[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            # Its handler still reads the body: there is nobody any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _watch(self) -> None:
        """Cut a connection that holds no request, or reads no answer, for too long. Bytes that do not add up to a
        request's head do not count."""
        now = self.loop.time()
        closing = self.transport.is_closing()
        is_busy = self.cycle is not None and not self.cycle.response_complete and not closing
        unread_bytes = self.transport.get_write_buffer_size()
        if is_busy or self.cycle is not self._seen or unread_bytes < self._unread_bytes:
            self._waits_since = now
        self._seen, self._unread_bytes = self.cycle, unread_bytes
        if closing or unread_bytes:
            limit_s = self._write_s
        else:
            limit_s = self._header_s + (0 if self.cycle is None else self.timeout_keep_alive)
        if now - self._waits_since >= limit_s:
            # Not `close`, which would wait for the reader.
            self.transport.abort()
            return
        self._tick = self.loop.call_later(self._tick_s, self._watch)


Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class _Crowded:
    """The application for a connection too many."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/health"):
            await self._app(scope, receive, send)
            return
        body = error_body(503)
        headers = [*error_headers(body), ("retry-after", "2"), ("x-should-retry", "true")]
        raw = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": 503, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def error_body(status: int) -> bytes:
    kind, message, code = ERRORS[status]
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode() + b"\n"


def error_headers(body: bytes) -> list[tuple[str, str]]:
    return [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
        ("x-request-id", f"req-{secrets.token_hex(12)}"),
    ]

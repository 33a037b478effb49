"""One streamed request, timed: a small HTTP/1.1 client over asyncio streams.

It shares the machine with the server it measures, so it does little: no HTTP library, one clock reading per read from
the socket, one JSON parse per event. It knows only the OpenAI wire format, so any compatible server can be the target.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

READ_SIZE = 1 << 16


class BenchError(Exception):
    """A sentence for the person at the keyboard: what was wrong and what to change."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. `prefix` is the path before `/v1/...`, empty for most servers."""

    host: str
    port: int
    is_tls: bool = False
    prefix: str = ""
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Target:
        """Read `http://host:port[/prefix]`; a trailing `/v1`, as OpenAI clients write it, is accepted and dropped.

        Raises BenchError if the URL has no host or another scheme.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError(f"--url is {url!r}, but must look like http://127.0.0.1:8000")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), is_tls, prefix, api_key)

    @property
    def url(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{self.host}:{self.port}{self.prefix}"


@dataclass(slots=True)
class Sample:
    """What one request showed. Times are seconds of `time.perf_counter()`.

    status         HTTP status; 0 = no answer (`error` says why)
    event_times    when each event that brought tokens arrived; the first is the first token
    output_tokens  from the server's usage, else the number of events (`is_counted` False)
    event_tokens   output tokens known by each of `event_times`
    texts          what each event brought
    drafted, accepted, draft_steps   from `usage.speculation`, where the server tells
    error          what went wrong, None for a complete answer
    """

    sent: float
    status: int = 0
    event_times: list[float] = field(default_factory=list)
    finished: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    is_counted: bool = False
    finish_reason: str | None = None
    error: str | None = None
    texts: list[str] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    draft_steps: int = 0
    event_tokens: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.error is None and bool(self.event_times)

    @property
    def ttft(self) -> float:
        return self.event_times[0] - self.sent

    def tokens_by(self, moment: float) -> int:
        """Output tokens that had arrived by then."""
        if self.finished <= moment:
            return self.output_tokens
        num_events = bisect_right(self.event_times, moment)
        return self.event_tokens[num_events - 1] if num_events else 0

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.event_times, self.event_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """(last token - first token) / (n - 1); None below two tokens."""
        if self.output_tokens < 2 or len(self.event_times) < 2:
            return None
        return (self.event_times[-1] - self.event_times[0]) / (self.output_tokens - 1)


async def stream(
    target: Target,
    path: str,
    body: dict[str, Any],
    timeout_s: float,
    on_event: Callable[[float], None] | None = None,
) -> Sample:
    """POST `body` and read the event stream to its end. Never raises for what the server does: see `Sample.error`.

    on_event   called with the arrival time of each event that brought tokens (for live measurements)
    Cancelling closes the connection, which a server should take as an abort.
    """
    sample = Sample(sent=time.perf_counter())
    try:
        async with asyncio.timeout(timeout_s):
            await _exchange(target, path, body, sample, on_event)
    except TimeoutError:
        sample.error = f"no complete answer within {timeout_s:g} s"
    except (OSError, EOFError, ValueError) as problem:
        sample.error = f"{type(problem).__name__}: {problem}"
    sample.finished = time.perf_counter()
    return sample


async def get_json(target: Target, path: str, timeout_s: float = 10.0) -> tuple[int, Any]:
    """GET a JSON document: (status, parsed body or None if it is no JSON). Raises BenchError if nobody answers."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await _connect(target)
            try:
                writer.write(_head(target, "GET", path, None))
                status, headers = await _read_head(reader)
                content = b"".join([chunk async for chunk in _body(reader, headers)])
            finally:
                writer.close()
    except (TimeoutError, OSError, EOFError) as problem:
        raise BenchError(
            f"nothing answers at {target.url} ({type(problem).__name__}). Start a server (make serve) or pass --url."
        ) from problem
    try:
        return status, json.loads(content)
    except ValueError:
        return status, None


async def _exchange(
    target: Target, path: str, body: dict[str, Any], sample: Sample, on_event: Callable[[float], None] | None
) -> None:
    payload = json.dumps(body).encode()
    reader, writer = await _connect(target)
    try:
        writer.write(_head(target, "POST", path, len(payload)) + payload)
        status, headers = await _read_head(reader)
        sample.status = status
        if status != 200:
            sample.error = _error_message(b"".join([chunk async for chunk in _body(reader, headers)]))
            return
        is_done = False
        rest = b""
        async for chunk in _body(reader, headers):
            now = time.perf_counter()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    is_done = _absorb(line[5:].strip(), now, sample, on_event) or is_done
        if not is_done and sample.error is None:
            sample.error = "the stream ended without [DONE]"
    finally:
        writer.close()


def _absorb(content: bytes, now: float, sample: Sample, on_event: Callable[[float], None] | None) -> bool:
    """Take one event into the sample; True for [DONE]."""
    if content == b"[DONE]":
        return True
    event = json.loads(content)
    if event.get("error"):
        sample.error = str(event["error"].get("message", event["error"]))
        return False
    tokens_before = sample.output_tokens
    usage = event.get("usage")
    if usage:
        sample.prompt_tokens = usage.get("prompt_tokens") or sample.prompt_tokens
        sample.output_tokens = usage.get("completion_tokens") or sample.output_tokens
        sample.is_counted = True
        if drafts := usage.get("speculation"):
            sample.drafted, sample.accepted, sample.draft_steps = (
                drafts["drafted"],
                drafts["accepted"],
                drafts["steps"],
            )
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
        has_text = bool(text)
        sample.texts.append(text)
        # A token may bring no text yet (half a character); then only a running usage count shows it.
        if has_text or (usage and sample.output_tokens > tokens_before):
            sample.event_times.append(now)
            if on_event:
                on_event(now)
            if not sample.is_counted:
                sample.output_tokens += 1
            sample.event_tokens.append(sample.output_tokens)
        sample.finish_reason = choice.get("finish_reason") or sample.finish_reason
    return False


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context() if target.is_tls else None
    return await asyncio.open_connection(target.host, target.port, ssl=context, limit=1 << 20)


def _head(target: Target, method: str, path: str, length: int | None) -> bytes:
    lines = [f"{method} {target.prefix}{path} HTTP/1.1", f"Host: {target.host}:{target.port}", "Connection: close"]
    if length is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    if target.api_key:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as problem:
        raise EOFError("the server closed the connection before answering") from problem
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split(" ", 2)[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it arrives, without transfer framing."""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    remaining = int(headers.get("content-length", -1))
    while remaining != 0:
        chunk = await reader.read(READ_SIZE if remaining < 0 else min(READ_SIZE, remaining))
        if not chunk:
            if remaining > 0:
                raise EOFError(f"the connection closed {remaining} bytes early")
            return
        remaining -= len(chunk) if remaining > 0 else 0
        yield chunk


def _error_message(content: bytes) -> str:
    try:
        error = json.loads(content)["error"]
        return str(error.get("message", error))
    except (ValueError, KeyError, TypeError, AttributeError):
        return content[:200].decode("utf-8", "replace") or "no body"

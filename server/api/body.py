"""Request bodies: read within limits of type, size and time. What they hold is parsed in `parse.py`."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from server.api.errors import ApiError, overloaded, shown
from server.api.settings import ApiSettings

CONTENT_TYPE_HINT = "send JSON with the right header (curl: -H 'Content-Type: application/json')"


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class BodyMemory:
    """Bytes of all bodies that are on their way in. A thousand slow clients must not fill the memory with halves."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0

    def take(self, size: int) -> None:
        """Raises ApiError 429 beyond the limit; what was taken before stays taken."""
        if self.held_bytes + size > self.max_bytes:
            raise overloaded("too many large bodies are being received; try again shortly", 1)
        self.held_bytes += size


async def read_body(scope: Scope, receive: Receive, settings: ApiSettings, memory: BodyMemory) -> bytes:
    """The raw body. Raises ApiError 413, 415, 408 or 429, or ClientGone."""
    headers = dict(scope["headers"])
    content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if content_type != b"application/json" and not (
        content_type.startswith(b"application/") and content_type.endswith(b"+json")
    ):
        given = shown(content_type.decode("latin-1")) or "missing"
        raise ApiError(415, f"the body's content type is {given}; {CONTENT_TYPE_HINT}")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise ApiError(415, "compressed bodies are not supported; send the JSON as it is")
    limit = settings.limits.max_body_bytes
    too_large = ApiError(413, f"the body is larger than {limit} bytes, the limit of this server")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = taken = 0
    try:
        async with asyncio.timeout(settings.timeouts.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise too_large
                if chunk:
                    memory.take(len(chunk))
                    taken += len(chunk)
                    chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {settings.timeouts.body_s:g} s") from error
    finally:
        memory.held_bytes -= taken

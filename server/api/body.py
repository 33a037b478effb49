"""Request bodies: read within limits, parsed as the JSON that JSON allows.

Python's own parser takes NaN, Infinity, numbers of any length and lone surrogates; each of them once became a 500
somewhere. Here they are a 400 that names the field.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from starlette.types import Receive, Scope

from server.api.errors import ApiError, invalid, shown
from server.api.settings import ApiSettings

MAX_INT = 1 << 64
CONTENT_TYPE_HINT = "send JSON with the right header (curl: -H 'Content-Type: application/json')"


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, settings: ApiSettings) -> bytes:
    """The raw body. Raises ApiError 413, 415 or 408, or ClientGone."""
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
    size = 0
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
                    chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {settings.timeouts.body_s:g} s") from error


def parse_body(raw: bytes, max_depth: int = 64) -> dict[str, Any]:
    """The JSON object in `raw`; of duplicate keys the last wins. Raises ApiError 400."""
    if not raw.strip():
        raise invalid(None, "the body is empty; it must be a JSON object", "invalid_json")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise invalid(None, "the body starts with a byte-order mark; send plain UTF-8 JSON", "invalid_json")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(None, f"the body is not valid UTF-8 (byte {error.start})", "invalid_json") from error
    value = _loads(text)
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    for key, item in value.items():
        _check_text(key, None)
        _check_tree(item, key, max_depth)
    return value


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise invalid(None, message, "invalid_json") from error
    except RecursionError as error:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from error
    except ValueError:
        # An integer of more than 4300 digits. Again, with infinity in its place: the tree check will name the field.
        try:
            return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 100 else math.inf)
        except (ValueError, RecursionError) as error:
            raise invalid(None, "the body is not valid JSON", "invalid_json") from error


def _check_tree(root: Any, param: str, max_depth: int) -> None:
    """Numbers finite and of sane size, text encodable, depth bounded; no recursion. The body itself is depth 1."""
    stack: list[tuple[Any, int]] = [(root, 2)]
    while stack:
        value, depth = stack.pop()
        kind = type(value)
        if kind is int:
            if not -MAX_INT <= value <= MAX_INT:
                raise _bad(param, "contains an integer beyond 64 bits")
        elif kind is float:
            if not math.isfinite(value):
                raise _bad(param, "contains a number that is not finite (NaN, Infinity or too large)")
        elif kind is str:
            _check_text(value, param)
        elif kind is list or kind is dict:
            if depth > max_depth:
                raise _bad(param, f"is nested deeper than {max_depth} levels")
            if kind is dict:
                for key in value:
                    _check_text(key, param)
                value = value.values()
            stack.extend((item, depth + 1) for item in value)


def _check_text(text: str, param: str | None) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _bad(param, "contains a lone surrogate, which is not a character") from error


def _name(param: str | None) -> str | None:
    return None if param is None else shown(param)


def _bad(param: str | None, problem: str) -> ApiError:
    return invalid(_name(param), f"{_name(param) or 'a field name'} {problem}")

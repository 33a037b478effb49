"""The JSON of a request body: parsed as the JSON that JSON allows, and never at the cost of other requests.

Python's own parser takes NaN, Infinity, numbers of any length and lone surrogates; each of them once became a 500
somewhere. Here they are a 400 that names the field. A C parser holds the interpreter lock until it is done, whatever
thread it runs on: what takes it longest, a million lists or names, is counted and refused before it starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import msgspec

from server.api.errors import ApiError, invalid, shown

MAX_INT = 1 << 64
MARKS = (b"[", b"{", b":")
MAX_EXPLAINED = 1 << 15
"""Commas of a broken body up to which Python's parser, five times slower, looks for the field to name."""

CHUNK = 1 << 13
"""List items looked at in one call into C: about 0.2 ms without another thread's turn."""


def parse_body(raw: bytes, max_depth: int = 64, max_items: int = 1 << 15) -> dict[str, Any]:
    """The JSON object in `raw`; of duplicate keys the last wins. Raises ApiError 400.

    max_items  lists, objects and names (`"name":`) in the whole body; plain values in a list are not counted
    """
    if not raw or raw.isspace():
        raise invalid(None, "the body is empty; it must be a JSON object", "invalid_json")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise invalid(None, "the body starts with a byte-order mark; send plain UTF-8 JSON", "invalid_json")
    _check_size(raw, max_items)
    value = _loads(raw)
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    for key, item in value.items():
        _check_text(key, None)
        _check_tree(item, key, max_depth)
    return value


def _check_size(raw: bytes, max_items: int) -> None:
    """Count what is costly to build. Soundly so up to the first byte that is not JSON, where any parser stops."""
    if sum(map(raw.count, MARKS)) <= max_items:
        return
    # Again without the strings: code in a prompt is full of brackets.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') <= 8 * max_items:
        outside = b"".join(plain.split(b'"')[::2])
        if sum(map(outside.count, MARKS)) <= max_items:
            return
    raise invalid(None, f"the body has more than {max_items} lists, objects and names; no field takes so many")


def _loads(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if raw.count(b",") > MAX_EXPLAINED:
            raise invalid(None, f"the body is not valid JSON: {error}", "invalid_json") from error
    return _explained(raw)


def _explained(raw: bytes) -> Any:
    """What is wrong, in words; or the value with NaN, infinities and surrogates in it, whose field is then named."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(None, f"the body is not valid UTF-8 (byte {error.start})", "invalid_json") from error
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 100 else math.inf)
    except json.JSONDecodeError as error:
        message = f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise invalid(None, message, "invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from error


def _check_tree(root: Any, param: str, max_depth: int) -> None:
    """Numbers finite and of sane size, text encodable, depth bounded; no recursion. The body itself is depth 1."""
    stack: list[tuple[Any, int]] = [(root, 2)]
    while stack:
        value, depth = stack.pop()
        kind = type(value)
        if kind is int:
            _check_int(value, param)
        elif kind is float:
            _check_finite((value,), param)
        elif kind is str:
            _check_text(value, param)
        elif kind is list or kind is dict:
            if depth > max_depth:
                raise _bad(param, f"is nested deeper than {max_depth} levels")
            if kind is dict:
                for key in value:
                    _check_text(key, param)
                value = list(value.values())
            for start in range(0, len(value), CHUNK):
                stack += ((item, depth + 1) for item in _check_plain(value[start : start + CHUNK], param))


def _check_plain(items: list[Any], param: str) -> list[Any]:
    """Check items of one plain type at C's speed; returns those that need a closer look."""
    kinds = set(map(type, items))
    if kinds == {int}:
        _check_int(min(items), param)
        _check_int(max(items), param)
        return []
    if kinds == {str}:
        _check_text("".join(items), param)
        return []
    if kinds == {float}:
        _check_finite(items, param)
        return []
    return items


def _check_finite(values: Iterable[float], param: str) -> None:
    if not all(map(math.isfinite, values)):
        raise _bad(param, "contains a number that is not finite (NaN, Infinity or too large)")


def _check_int(value: int, param: str) -> None:
    if not -MAX_INT <= value <= MAX_INT:
        raise _bad(param, "contains an integer beyond 64 bits")


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

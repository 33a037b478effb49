"""The OpenAI error object, and every way a request can fail. Nothing here shows a path, a traceback or raw input."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

MAX_MESSAGE_CHARS = 600

CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """A refusal or failure with its HTTP status.

    param        the field of the body it is about
    retry_after  seconds, for 429 and 503
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:MAX_MESSAGE_CHARS]
        self.param = param
        self.code = code if code is not None else CODES.get(status, "invalid_value" if param else "invalid_request")
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        # C-01: official clients retry 408, 409, 429 and every 5xx by themselves; say when that is pointless.
        if self.status >= 400:
            headers["x-should-retry"] = "true" if self.status in (429, 503) else "false"
        return headers

    def response(self) -> Response:
        return JsonResponse(self.body(), self.status, self.headers())


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param, code)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param, "unsupported_parameter")


def overloaded(message: str, retry_after: int) -> ApiError:
    return ApiError(429, message, None, "rate_limit_exceeded", retry_after)


def shown(value: object, max_chars: int = 80) -> str:
    """A client's value, fit to be quoted in a message: short, printable, one line."""
    text = str(value) if isinstance(value, str | int | float) else type(value).__name__
    text = text[:max_chars] + ("..." if len(text) > max_chars else "")
    text = text.encode("ascii", "backslashreplace").decode()
    # Control characters are ASCII too: a terminal that shows the log must not obey them (S-80).
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class JsonResponse(Response):
    """One line of JSON and a newline (curl users see their prompt on its own line)."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        super().__init__(text.encode("utf-8", "backslashreplace") + b"\n", status, headers)

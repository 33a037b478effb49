"""What happens to every HTTP request before any handler: id, limits of the head, host, key; and after it: log, metrics.

Pure ASGI: bodies are neither read nor buffered here, so a request without a key costs no memory (S-13). Paths are
judged on `scope["path"]` alone, never on a URL rebuilt from the Host header (S-05).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, shown
from server.api.services import Services

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/generate", "/ping", "/version"})
"""Routes that need no key (`/metrics` too, unless configured). All else does, even routes that do not exist."""

GUARDED_PATHS = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model:path}"),
        *("/v1/denoise/stream", "/tokenize", "/detokenize", "/openapi.json"),
    }
)
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/generate", "/ping", "/metrics"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class EdgeMiddleware:
    """Wraps the application. A refusal here is an OpenAI error object like any other."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app, self._services = app, services
        settings = services.settings
        self._key_digests = tuple((hashlib.sha256(key.encode()).digest(), key) for key in settings.api_keys)
        self._open = OPEN_PATHS if settings.metrics_need_key else OPEN_PATHS | {"/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        headers = dict(scope["headers"])
        method = scope["method"]
        answer = _Answer(send, _request_id(headers.get(b"x-request-id", b"")), has_body=method != "HEAD")
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            self._judge(scope, headers)
            await self._app(scope, receive, answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except Exception:
            logger.exception("request %s failed", answer.request_id)
            if not answer.has_started:
                await ApiError(500, "internal error").response()(scope, receive, answer)
        finally:
            self._note(scope, method, answer, time.monotonic() - started_at)

    def _judge(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        limits = self._services.settings.limits
        pairs = scope["headers"]
        if len(pairs) > limits.max_headers or sum(len(k) + len(v) for k, v in pairs) > limits.max_header_bytes:
            raise ApiError(
                431, f"too many or too long headers (limits: {limits.max_headers}, {limits.max_header_bytes} B)"
            )
        length = headers.get(b"content-length")
        if length is not None and not length.isdigit():
            raise ApiError(400, "the Content-Length header is not a number")
        if length is not None and b"transfer-encoding" in headers:
            raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other")
        self._check_host(headers)
        if self._key_digests and scope["path"] not in self._open:
            scope["braid_key"] = self._checked_key(headers)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        allowed = self._services.settings.allowed_hosts
        if allowed is None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if name not in allowed:
            message = f"the host {shown(name)} is not served here (--allowed-hosts)"
            raise ApiError(400, message, code="invalid_host")

    def _checked_key(self, headers: dict[bytes, bytes]) -> str:
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        found: str | None = None
        for digest, key in self._key_digests:  # all of them, always: no early exit to time (S-10)
            if hmac.compare_digest(digest, given):
                found = key
        if found is None or kind.lower() != b"bearer":
            self._services.metrics.count_auth_failure()
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
        return found

    def _note(self, scope: Scope, method: str, answer: _Answer, seconds: float) -> None:
        route = scope.get("route")
        template = getattr(route, "path", "other")
        # No status: the client left before there was one (other servers write 499).
        self._services.metrics.observe_http(template, method, answer.status or 499, seconds)
        if self._services.settings.log_requests and scope["path"] not in QUIET_PATHS:
            logger.info(
                "%s %s status=%d seconds=%.3f request_id=%s",
                shown(method, 10),
                shown(scope["path"], 100),
                answer.status or 499,
                seconds,
                answer.request_id,
            )


class _Answer:
    """`send` that adds x-request-id to the head and remembers the status; to HEAD it gives the head of GET's answer."""

    def __init__(self, send: Send, request_id: str, has_body: bool) -> None:
        self._send, self._has_body = send, has_body
        self.request_id = request_id
        self.status = 0

    @property
    def has_started(self) -> bool:
        return self.status != 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[Any] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        elif not self._has_body and "body" in message:
            message = {**message, "body": b""}
        await self._send(message)


def _request_id(given: bytes) -> str:
    """The client's id if it is harmless, else a new one. Only echoed: ids inside are our own (S-27)."""
    text = given.decode("latin-1")
    return text if REQUEST_ID.fullmatch(text) else f"req-{secrets.token_hex(12)}"

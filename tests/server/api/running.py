"""A real uvicorn server in a thread, and raw sockets to talk to it: disconnects do not exist in in-process clients."""

from __future__ import annotations

import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from scheduler.types import DiffusionModel
from server.api.app import Application, create_app
from server.api.settings import ApiSettings
from server.metrics import Metrics
from server.protocol import PatientProtocol
from server.text.tokenizer import Tokenizer
from tests.server.api.fake_engine import MODEL_LEN, FakeEngine, Script, byte_tokenizer

PATIENCE_S = 60.0
"""How long a test waits for what must happen: only a broken server takes so long, however slow the machine is."""


class Server:
    """What a test holds of a running server."""

    def __init__(
        self, engine: FakeEngine, tokenizer: Tokenizer, app: Application, port: int, connections: set[Any]
    ) -> None:
        self.engine, self.tokenizer, self.app, self.port = engine, tokenizer, app, port
        self.connections = connections
        self.url = f"http://127.0.0.1:{port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=PATIENCE_S, **options)

    def client(self) -> httpx.Client:
        """One connection, kept: for many calls."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def held(self) -> tuple[int, int, int]:
        """Requests in the engine, permits, prompt tokens of the permits: (0, 0, 0) when nothing is held."""
        admission = self.app.services.admission
        return len(self.engine.in_flight), admission.num_requests, admission.num_tokens

    def post_and_keep(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request and return its socket, unread."""
        sock = self.connect()
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return sock


def make_app(
    script: Script | None = None,
    settings: ApiSettings | None = None,
    chat_template: str | None = "default",
    max_seqs: int = 8,
    queue: int = 32,
    diffusion: DiffusionModel | None = None,
) -> tuple[Application, FakeEngine, Tokenizer]:
    tokenizer = byte_tokenizer() if chat_template == "default" else byte_tokenizer(chat_template)
    engine = FakeEngine(tokenizer, script, max_seqs, queue, diffusion)
    app = create_app(settings or ApiSettings(("tiny",)), engine, tokenizer, Metrics("tiny", MODEL_LEN))
    return app, engine, tokenizer


@contextmanager
def serving(
    script: Script | None = None,
    settings: ApiSettings | None = None,
    max_seqs: int = 8,
    queue: int = 32,
    header_s: float = PATIENCE_S,
    keep_alive_s: int = int(PATIENCE_S),
    max_connections: int = 1024,
    send_buffer: int | None = None,
    diffusion: DiffusionModel | None = None,
) -> Iterator[Server]:
    """A server as `server/serve.py` sets it up, with the timeouts of its settings."""
    app, engine, tokenizer = make_app(script, settings, max_seqs=max_seqs, queue=queue, diffusion=diffusion)
    # With the protocol number, or asyncio leaves Nagle on: head and body then arrive 40 ms apart.
    sock = socket.socket(proto=socket.IPPROTO_TCP)
    if send_buffer is not None:
        # Of each connection; the kernel would take megabytes for a reader that does not read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    sock.bind(("127.0.0.1", 0))
    write_s = app.services.settings.timeouts.write_s
    protocol = functools.partial(PatientProtocol, header_s=header_s, write_s=write_s, max_connections=max_connections)
    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        log_level="critical",
        server_header=False,
        h11_max_incomplete_event_size=app.services.settings.limits.max_header_bytes,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Server(engine, tokenizer, app, sock.getsockname()[1], server.server_state.connections)
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)

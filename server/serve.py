"""The server's life: engine process and HTTP started side by side, serving, drain, exit code.

Exit codes: 0 after a drain, 1 when the engine could not start or was given up, 2 when nothing could begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import importlib.metadata
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from scheduler.types import StepStats
from server.banner import banner
from server.config import ServerConfig
from server.engine.client import EngineClient, EngineStartError
from server.engine.config import EngineInfo
from server.engine.log import configure_logging
from server.protocol import PatientProtocol

if TYPE_CHECKING:
    from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FLUSH_S = 2.0
"""After the last token of a drain: time for the last bytes to leave."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def say(problem: str) -> None:
    """Why it ends, as one line for a person."""
    sys.stderr.write(f"error: {' '.join(problem.split())}\n")


class FrontDoor:
    """The ASGI application: answers the probes while the model loads, then is the real one."""

    def __init__(self) -> None:
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope["path"], send)

    async def _answer(self, path: str, send: Send) -> None:
        is_alive = path == "/health/live"
        body = b'{"error":{"message":"the engine is loading its model","type":"server_error","param":null,"code":null}}'
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"2")]
        start = {"type": "http.response.start", "status": 200 if is_alive else 503, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": b"{}" if is_alive else body})


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: draining is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: ServerConfig) -> int:
    """Run until a signal or the engine's end; the exit code."""
    started_at = time.monotonic()
    configure_logging(config.log_format, config.log_level)
    # What it logs below that are clients' mistakes; our own failures are logged where they happen.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    # Text is worked on in threads beside the event loop, which takes the interpreter lock back at each of its calls.
    sys.setswitchinterval(0.001)
    if _has_kernels_package():
        say("the PyPI package 'kernels' is installed beside Braid, whose folder has that name; pip uninstall kernels")
        return 2
    try:
        check_model(config)
    except ValueError as error:
        say(str(error))
        return 1
    try:
        listener = listen(config.host, config.port)
    except OSError as error:
        say(str(error.args[-1]))
        return 2
    with listener:
        return asyncio.run(_Server(config, listener, started_at).run())


def check_model(config: ServerConfig) -> None:
    """Raise ValueError at once for a model that is plainly a path and not there; hub ids are the engine's to fetch."""
    from server.models.locate import resolve_model

    names = [] if config.random_weights is not None else [config.model]
    names += [other.model for other in config.also()]
    names += [] if config.draft_model is None or config.speculation == "off" else [config.draft_model]
    for name in names:
        if name.startswith((".", "/", "~")) or Path(name).exists():
            resolve_model(name)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError with a sentence."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"--host {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} on {host} is in use; stop what listens there or choose another --port"
            ) from None
        raise OSError(f"cannot bind port {port} on {host}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


class _Server:
    """One run of the program."""

    def __init__(self, config: ServerConfig, listener: socket.socket, started_at: float) -> None:
        self._config, self._listener, self._started_at = config, listener, started_at
        self._observe: dict[str, Callable[[StepStats], None]] = {}
        self._client = EngineClient(config.engine_config(), self._on_step, config.log_format, config.log_level)
        self._door = FrontDoor()
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._http = _Uvicorn(
            uvicorn.Config(
                self._door,
                http=functools.partial(  # type: ignore[arg-type]
                    PatientProtocol,
                    header_s=config.header_timeout,
                    write_s=config.write_timeout,
                    max_connections=config.max_connections,
                ),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=config.max_header_size,
                timeout_keep_alive=int(config.keep_alive_timeout),
                timeout_graceful_shutdown=int(FLUSH_S),
            )
        )

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        http = asyncio.create_task(self._http.serve([self._listener]))
        try:
            async with contextlib.AsyncExitStack() as stack:
                if (code := await self._start(stack)) is not None:
                    return code
                return await self._until_end(http)
        finally:
            await self._client.shutdown(0)
            await self._stop_http(http)

    async def _start(self, stack: contextlib.AsyncExitStack) -> int | None:
        """Load everything; an exit code if it was not to be."""
        loading = asyncio.create_task(self._load(stack))
        stopped = asyncio.create_task(self._signals.get())
        try:
            await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                return 0
            await loading
        except (EngineStartError, OSError, ValueError) as error:
            say(str(error))
            return 1
        finally:
            for task in (loading, stopped):
                task.cancel()
            await asyncio.gather(loading, stopped, return_exceptions=True)
        return None

    async def _load(self, stack: contextlib.AsyncExitStack) -> None:
        engine = asyncio.create_task(self._client.launch())
        try:
            # The child is started on this thread before the imports hold it; they then overlap its own.
            await asyncio.sleep(0)
            before = time.monotonic()
            from server.api.app import create_app
            from server.metrics import Metrics

            imported_at = time.monotonic()
            await engine
        except BaseException:
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
            raise
        facts = self._client.info
        settings = self._config.api_settings()
        parts: list[tuple[str, Any, Metrics]] = []
        for info in facts.models:
            tokenizer = await asyncio.to_thread(self._tokenizer, info)
            drafters = tuple(drafter for drafter, _ in info.drafters)
            name, first = info.name or settings.served_model_names[0], parts[0][2] if parts else None
            metrics = Metrics(name, info.model_len, drafters, info.max_drafts, first)
            parts.append((info.name, tokenizer, metrics))
            self._observe[info.name] = metrics.observe_step
        app = create_app(settings, self._client, *parts[0][1:], parts[1:])
        await stack.enter_async_context(app.api.router.lifespan_context(app.api))
        self._door.app = app
        # What is here stays: a full collection need not stop the loop to look at it again.
        gc.collect()
        gc.freeze()
        total = time.monotonic() - self._started_at
        phases = (*facts.phases, ("front end", imported_at - before), ("total", total))
        if not self._config.quiet:
            sys.stdout.write(banner(self._config, facts, self._listener.getsockname()[1], phases) + "\n")
            sys.stdout.flush()

    def _tokenizer(self, facts: EngineInfo) -> Tokenizer:
        """Of the model's folder; a hub model is in the cache by now, the engine has fetched it. Raises ValueError."""
        from server.models.locate import resolve_model
        from server.text.tokenizer import Tokenizer

        revision = None if facts.name else self._config.revision
        tokenizer = Tokenizer.load(resolve_model(facts.model, revision, self._config.download_dir))
        if facts.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the model {facts.model} has a vocabulary of {facts.vocab_size}, but its tokenizer gives ids up to "
                f"{tokenizer.vocab_size - 1}; with --random-weights ask for vocab={tokenizer.vocab_size} or more"
            )
        return tokenizer

    def _on_step(self, stats: StepStats) -> None:
        if (observe := self._observe.get(stats.model)) is not None:
            observe(stats)

    async def _until_end(self, http: asyncio.Task[None]) -> int:
        """Serve; then the exit code."""
        stop = asyncio.create_task(self._signals.get())
        dead = asyncio.create_task(self._client.dead.wait())
        await asyncio.wait((stop, dead, http), return_when=asyncio.FIRST_COMPLETED)
        for task in (stop, dead):
            task.cancel()
        if self._client.dead.is_set():
            say(f"the engine is given up: {self._client.death_cause}")
        if self._client.dead.is_set() or http.done():
            return 1
        await self._drain()
        return 0

    async def _drain(self) -> None:
        """Let what is in flight finish, unless a second signal comes (R-19)."""
        num = self._client.num_in_flight
        logger.info("draining: %d requests in flight; signal again to stop at once", num)
        self._client.begin_drain()
        second = asyncio.create_task(self._signals.get())
        patience = asyncio.create_task(self._wait_idle())
        await asyncio.wait((second, patience), return_when=asyncio.FIRST_COMPLETED)
        if second.done():
            self._http.force_exit = True
        for task in (second, patience):
            task.cancel()

    async def _wait_idle(self) -> None:
        await asyncio.sleep(self._config.drain_delay)
        if not await self._client.wait_idle(self._config.drain_timeout):
            logger.warning("%d requests did not finish in %g s", self._client.num_in_flight, self._config.drain_timeout)

    async def _stop_http(self, http: asyncio.Task[None]) -> None:
        self._http.should_exit = True
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(http, FLUSH_S + 0.5)


def _has_kernels_package() -> bool:
    try:
        importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

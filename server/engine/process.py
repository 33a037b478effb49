"""One engine process seen from its parent: started, spoken to, watched, ended. It knows nothing of requests.

The child is `python -m server.engine`; it gets its configuration over standard input, which stays open for life: its
end of file tells the child that we are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from server.engine.config import EngineConfig
from server.engine.link import Address, FromEngine, ToEngine, client_codec, configure

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "server.engine")


class EngineProcess:
    """A running child and our end of the link.

    on_message  called on the event loop for each message, in order
    on_exit     called once on the event loop when the process has ended, after its last message
    The child is started by the thread that constructs this, which must live as long as the child should (Linux ends a
    child with the thread that started it).
    """

    def __init__(
        self,
        config: EngineConfig,
        on_message: Callable[[FromEngine], None],
        on_exit: Callable[[int], None],
        log_format: str = "text",
        log_level: str = "INFO",
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._on_message, self._on_exit = on_message, on_exit
        self._codec = client_codec()
        self._loop = asyncio.get_running_loop()
        self._address = Address()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        configure(self._socket)
        self._socket.bind(self._address.endpoint)
        self._is_closed = False
        self._has_exited = False
        self.heard_at = time.monotonic()
        bootstrap = msgspec.msgpack.encode(
            {"endpoint": self._address.endpoint, "config": config, "log_format": log_format, "log_level": log_level}
        )
        try:
            self._child = subprocess.Popen(list(command), stdin=subprocess.PIPE, env=_environment())
        except OSError:
            self._close_link()
            raise
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(len(bootstrap).to_bytes(4, "big") + bootstrap)
            self._child.stdin.flush()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.receive)
        self._pidfd = self._watch_exit()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def num_dropped(self) -> int:
        return self._codec.num_dropped

    def send(self, message: ToEngine) -> None:
        """Queue a message; a dead peer swallows it."""
        if self._is_closed:
            return
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(self._codec.encode(message), zmq.NOBLOCK)
        # The socket's descriptor is edge-triggered: a send may have eaten the edge of an arriving message.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self.receive)

    def receive(self) -> None:
        """Handle every message that has arrived."""
        while not self._is_closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            self.heard_at = time.monotonic()
            message = self._codec.decode(frame)
            if message is not None:
                self._on_message(message)

    def check_exit(self) -> None:
        """Notice an ended child; for machines without pidfd this is the only way."""
        code = self._child.poll()
        if code is None or self._has_exited:
            return
        self._has_exited = True
        self.receive()
        self._unwatch()
        self._on_exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._child.poll() is None:
            self._child.send_signal(number)

    async def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None if it still runs after `timeout_s`."""
        for _ in range(max(1, int(timeout_s / 0.01))):
            if self._child.poll() is not None:
                break
            await asyncio.sleep(0.01)
        return self._child.poll()

    def close(self) -> None:
        """End the child now if it runs, and remove all traces. Idempotent; `on_exit` is not called any more."""
        if self._is_closed:
            return
        self._has_exited = True
        self.kill()
        self._child.wait()
        self._unwatch()
        with contextlib.suppress(OSError):
            assert self._child.stdin is not None
            self._child.stdin.close()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._close_link()

    def _close_link(self) -> None:
        self._is_closed = True
        self._socket.close(linger=0)
        self._context.term()
        self._address.close()

    def _watch_exit(self) -> int | None:
        try:
            pidfd = os.pidfd_open(self._child.pid)
        except (AttributeError, OSError):
            return None
        self._loop.add_reader(pidfd, self.check_exit)
        return pidfd

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None


def _environment() -> dict[str, str]:
    """Ours, with the tree first on the module path: the child finds the same sources from any working directory."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}

"""An engine process: bootstrap, then `drain; plan; launch; send; launch ahead; collect` until it is told to stop or is
orphaned.

Nothing here waits for the network or the front end (R9): sends are queued by zmq, an idle loop blocks on its sockets.
A fault that is not one request's ends the process with a non-zero code; the front end starts another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from scheduler.types import StepPlan
from server.engine.coalesce import Outgoing
from server.engine.config import EngineConfig, EngineInfo
from server.engine.core import EngineCore
from server.engine.link import Abort, Add, FromEngine, Ready, StartFailed, Stop, Update, configure, engine_codec
from server.engine.log import configure_logging
from server.engine.several import SeveralCores

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
STUCK_POLL_MS = 20
EXIT_FAULT, EXIT_START, EXIT_ORPHAN = 70, 78, 3

Core = EngineCore | SeveralCores
Build = Callable[[EngineConfig, Callable[[], None]], tuple[Core, EngineInfo]]


class Bootstrap(msgspec.Struct, frozen=True):
    """What the parent writes to our standard input, once; its end of file later means that the parent is gone."""

    endpoint: str
    config: EngineConfig
    log_format: str = "text"
    log_level: str = "INFO"


class Loop:
    """One core and one end of the link."""

    def __init__(self, endpoint: str, delta_interval_s: float, step_timeout_s: float) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        configure(self._socket)
        self._socket.connect(endpoint)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._codec = engine_codec()
        self._outgoing = Outgoing(delta_interval_s)
        # Silence of a quarter of the timeout counts as hung.
        self._heartbeat_ms = int(1000 * min(HEARTBEAT_S, step_timeout_s / 8))
        self._is_stopped = False

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._codec.encode(message), copy=True)

    def wake(self) -> None:
        """From any thread: end the idle wait. A full pipe means that it is already ending."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def run(self, core: Core) -> None:
        while True:
            self._drain(core)
            if self._is_stopped:
                return
            plan = core.under_way
            if plan is None and (plan := core.plan()) is not None:
                core.launch(plan)
            self._outgoing.add(core.take_outbox(), None)
            if plan is None:
                self._send_if_due(None)
                self._wait(core)
                continue
            # Beside a device that computes: the last step's tokens leave, and what has arrived is taken in.
            self._send_if_due(plan)
            if core.is_asynchronous:
                self._drain(core)
                core.launch_ahead()
            self._outgoing.add(*core.collect())
            if not core.is_asynchronous:
                self._send_if_due(None, more=core.has_work)

    def close(self) -> None:
        """Let the last message out, then close."""
        self._socket.close(linger=500)
        self._context.term()

    def _send_if_due(self, plan: StepPlan | None, more: bool = False) -> None:
        """Send what would be late after the next step; without a next one (`plan` and `more` false), everything."""
        now = time.monotonic()
        if plan is not None:
            # No forecast yet: the step may be long.
            next_step_s = plan.predicted_s or float("inf")
        else:
            next_step_s = 0.0 if more else float("inf")
        if self._outgoing.is_due(now, next_step_s):
            self.send(self._outgoing.take(now))

    def _wait(self, core: Core) -> None:
        """Nothing to run: sleep until a message, a compiled grammar or the next heartbeat."""
        timeout_ms = STUCK_POLL_MS if core.has_work else self._heartbeat_ms
        ready = dict(self._poller.poll(timeout_ms))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        if not ready and not core.has_work:
            self.send(Update())

    def _drain(self, core: Core) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            match self._codec.decode(frame):
                case Add(request, is_resubmission):
                    core.add(request, is_resubmission)
                case Abort(request_id):
                    core.abort(request_id)
                    self._outgoing.drop(request_id)
                case Stop():
                    self._is_stopped = True
                    return


def die_with_parent() -> None:
    """End this process when its parent ends: a kernel signal (Linux), and the end of file of standard input (R-21)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(EXIT_ORPHAN)

    threading.Thread(target=watch, daemon=True, name="braid-parent").start()


def read_bootstrap() -> Bootstrap:
    """Four bytes of length, then msgpack."""
    size = int.from_bytes(_read_exactly(4), "big")
    return msgspec.msgpack.decode(_read_exactly(size), type=Bootstrap)


def _read_exactly(size: int) -> bytes:
    out = b""
    while len(out) < size:
        part = os.read(0, size - len(out))
        if not part:
            os._exit(EXIT_ORPHAN)
        out += part
    return out


def run_engine(build: Build) -> int:
    """Be an engine process; its exit code. `build` makes the core, and may raise what it likes."""
    # The terminal and a service manager signal the whole group; draining is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    bootstrap = read_bootstrap()
    configure_logging(bootstrap.log_format, bootstrap.log_level)
    die_with_parent()
    loop = Loop(bootstrap.endpoint, bootstrap.config.delta_interval_s, bootstrap.config.step_timeout_s)
    try:
        core, facts = build(bootstrap.config, loop.wake)
    except Exception as error:
        logger.debug("the engine could not start", exc_info=True)
        loop.send(StartFailed(one_line(error)))
        loop.close()
        return EXIT_START
    # What was loaded stays: a full collection would walk all of it, a stall of many steps.
    gc.collect()
    gc.freeze()
    loop.send(Ready(facts))
    try:
        loop.run(core)
    except Exception:
        logger.critical("the engine ends: a step failed for a reason that is no request's", exc_info=True)
        logging.shutdown()
        # At once: the device may hang in any destructor.
        os._exit(EXIT_FAULT)
    loop.close()
    core.close()
    return 0


def one_line(error: Exception) -> str:
    """The error as one line for a person; the type is said where the text alone would not be understood."""
    text = " ".join(str(error).split())
    plain = isinstance(error, ValueError | OSError) and text
    return text if plain else f"{type(error).__name__}: {text}".rstrip(": ")

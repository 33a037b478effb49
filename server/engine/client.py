"""EngineClient: the asyncio side of the engine. No torch, no tensors (R9).

It starts the engine process, gives each request a stream of deltas, watches the step loop, and when the engine dies
starts another one and resubmits what was in flight: the streams go on with the same tokens. Rules E1-E6 in README.md.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Sequence
from typing import Self

from scheduler.types import Delta, Fault, FinishReason, Request, StepStats
from server.engine.coalesce import together
from server.engine.config import EngineConfig, EngineInfo, EngineState
from server.engine.crashes import CrashBudget, describe_exit
from server.engine.in_flight import DeltaStream, InFlight
from server.engine.link import Abort, Add, FromEngine, Ready, StartFailed, Stop, Update
from server.engine.process import COMMAND, EngineProcess
from server.engine.unavailable import EngineStartError, EngineUnavailable, refuse_if_unavailable

__all__ = ["DeltaStream", "EngineClient", "EngineStartError", "EngineUnavailable"]

logger = logging.getLogger(__name__)

MAX_CRASHES_OF_A_REQUEST = 3
TICK_S = 0.25
ABORT_GRACE_S = 2.0
STOP_GRACE_S = 2.0


class EngineClient:
    """One engine, restarted when it dies. All methods belong to the event loop's thread."""

    def __init__(
        self,
        config: EngineConfig,
        on_step: Callable[[StepStats], None] | None = None,
        log_format: str = "text",
        log_level: str = "INFO",
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._config, self._on_step = config, on_step
        self._how = (log_format, log_level, command)
        self._state = EngineState.LOADING
        self._process: EngineProcess | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._in_flight: dict[str, InFlight] = {}
        self._budget = CrashBudget()
        self._recovery: asyncio.Task[None] | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        self._info: EngineInfo | None = None
        self.dead = asyncio.Event()
        self.death_cause = ""
        self._stats: dict[str, StepStats] = {}
        self.restarts = 0

    @classmethod
    async def start(
        cls,
        engine_config: EngineConfig,
        on_step: Callable[[StepStats], None] | None = None,
        log_format: str = "text",
        log_level: str = "INFO",
        command: Sequence[str] = COMMAND,
    ) -> Self:
        """Start the process and wait until it serves. Raises EngineStartError; then no process is left behind."""
        client = cls(engine_config, on_step, log_format, log_level, command)
        await client.launch()
        return client

    async def launch(self) -> None:
        """As `start`, for a client that others already hold (its state is LOADING meanwhile)."""
        try:
            await self._spawn()
        except BaseException:
            self._state = EngineState.DEAD
            raise
        self._state = EngineState.READY
        self._watchdog = asyncio.create_task(self._watch(), name="braid-watchdog")

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine has not started yet"
        return self._info

    @property
    def state(self) -> EngineState:
        if self._state is EngineState.READY:
            if self._silence_s() > self._config.step_timeout_s / 4:
                return EngineState.HUNG
            if self._is_draining:
                return EngineState.DRAINING
        return self._state

    @property
    def stats(self) -> StepStats:
        """Of the last step; of several models, with the gauges of all together."""
        return together(self._stats.values())

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended, as the client counts them."""
        return len(self._in_flight)

    @property
    def num_dropped_frames(self) -> int:
        return self._process.num_dropped if self._process is not None else 0

    def generate(self, request: Request) -> DeltaStream:
        """Submit a request. Raises EngineUnavailable, or ValueError for an id in flight or a model that is not here."""
        refuse_if_unavailable(self._state, self._is_draining)
        self.info.of(request.model)
        if request.id in self._in_flight:
            raise ValueError(f"request id {request.id!r} is already in flight")
        stream = DeltaStream(request.id, self.abort)
        self._in_flight[request.id] = InFlight(request, stream, time.monotonic())
        self._is_idle.clear()
        assert self._process is not None
        self._process.send(Add(request))
        return stream

    def abort(self, request_id: str) -> None:
        """End a request wherever it is. Idempotent; its stream says no more."""
        if self._in_flight.pop(request_id, None) is None:
            return
        self._note_idle()
        if self._process is not None and self._state is EngineState.READY:
            self._process.send(Abort(request_id))

    def begin_drain(self) -> None:
        """From now on new requests are refused; those in flight go on."""
        self._is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """True once nothing is in flight, False after `timeout_s`."""
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def shutdown(self, drain_timeout_s: float) -> None:
        """Refuse new requests, let those in flight finish for at most `drain_timeout_s`, end the process."""
        self.begin_drain()
        if drain_timeout_s > 0:
            await self.wait_idle(drain_timeout_s)
        self._fail_all(Fault(503, "the server is shutting down"))
        was_dead = self._state is EngineState.DEAD
        self._state = EngineState.DEAD
        for task in (self._watchdog, self._recovery):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._process is not None:
            if not was_dead:
                self._process.send(Stop())
                await self._process.wait(STOP_GRACE_S)
            self._process.close()
            self._process = None

    async def _spawn(self) -> None:
        """Start a process and wait for its Ready. On any error no process is left."""
        started: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._started = started
        process = self._process = EngineProcess(self._config, self._on_message, self._on_exit, *self._how)
        try:
            self._info = await started
        except BaseException:
            process.close()
            self._process = None
            raise
        finally:
            self._started = None

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, Update):
            self._absorb(message)
        elif self._started is not None and not self._started.done():
            if isinstance(message, Ready):
                self._started.set_result(message.info)
            elif isinstance(message, StartFailed):
                self._started.set_exception(EngineStartError(message.message))

    def _absorb(self, update: Update) -> None:
        for delta in update.deltas:
            flight = self._in_flight.get(delta.request_id)
            if flight is None:
                continue
            if delta.finish_reason is not None:
                del self._in_flight[delta.request_id]
                self._note_idle()
            flight.absorb(delta)
        for stats in update.steps:
            self._stats.pop(stats.model, None)
            self._stats[stats.model] = stats
            if self._on_step is not None:
                try:
                    self._on_step(stats)
                except Exception:
                    logger.exception("the metrics hook failed")

    def _on_exit(self, code: int) -> None:
        if self._started is not None:
            if not self._started.done():
                self._started.set_exception(EngineStartError(f"the engine process ended {describe_exit(code)}"))
            return
        if self._state is EngineState.DEAD:
            return
        logger.error("the engine process ended %s with %d requests in flight", describe_exit(code), self.num_in_flight)
        self._state = EngineState.RESTARTING
        self._recovery = asyncio.create_task(self._recover(), name="braid-recovery")

    async def _recover(self) -> None:
        """A new engine with everything that was in flight, within the crash budget."""
        assert self._process is not None
        self._process.close()
        self._process = None
        self._note_crash()
        delay_s = 0.1
        while not self._budget.is_spent:
            try:
                await self._spawn()
                break
            except (EngineStartError, OSError) as error:
                logger.error("the engine did not start again: %s", error)
                self._budget.note(time.monotonic())
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, 5.0)
        else:
            self._die(str(self._budget))
            return
        self.restarts += 1
        self._state = EngineState.READY
        process = self._process
        assert process is not None
        for flight in self._in_flight.values():
            process.send(Add(flight.resubmission(time.monotonic()), is_resubmission=True))
        logger.warning("the engine is back; %d requests go on", self.num_in_flight)

    def _note_crash(self) -> None:
        self._budget.note(time.monotonic())
        now = time.monotonic()
        for request_id, flight in list(self._in_flight.items()):
            flight.note_crash(now)
            if flight.num_crashes >= MAX_CRASHES_OF_A_REQUEST:
                # It was there each time; one request must not take the service down.
                self._end(request_id, Fault(500, f"the engine failed {flight.num_crashes} times on this request"))
        self._stats = {}

    def _die(self, cause: str) -> None:
        logger.critical("the engine is given up: %s", cause)
        self._state = EngineState.DEAD
        self.death_cause = cause
        self._fail_all(Fault(500, "the engine has failed"))
        self.dead.set()

    def _fail_all(self, fault: Fault) -> None:
        for request_id in tuple(self._in_flight):
            self._end(request_id, fault)

    def _end(self, request_id: str, fault: Fault) -> None:
        flight = self._in_flight.pop(request_id)
        flight.absorb(Delta(request_id, finish_reason=FinishReason.ERROR, fault=fault))
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._in_flight:
            self._is_idle.set()

    def _silence_s(self) -> float:
        return time.monotonic() - self._process.heard_at if self._process is not None else 0.0

    async def _watch(self) -> None:
        """Kill an engine whose loop is silent for too long; `_on_exit` does the rest."""
        tick_s = min(TICK_S, self._config.step_timeout_s / 8)
        while True:
            before = time.monotonic()
            await asyncio.sleep(tick_s)
            process = self._process
            if process is None or self._state is not EngineState.READY:
                continue
            process.receive()
            process.check_exit()
            if time.monotonic() - before > 1.0 + tick_s:
                # We were the ones who slept (a suspended machine, a blocked event loop): the engine gets a new chance.
                process.heard_at = time.monotonic()
            if self._silence_s() > self._config.step_timeout_s and self._state is EngineState.READY:
                logger.critical("no step has ended for %.1f s: killing the engine", self._silence_s())
                process.kill(signal.SIGABRT)
                if await process.wait(ABORT_GRACE_S) is None:
                    process.kill()

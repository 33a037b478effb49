"""Compiling structured-output constraints beside the loop: a bounded number at once, each with a time limit.

A compilation cannot be interrupted. One that passes its limit is given up: its request fails, its thread ends when it
ends, and while too many such threads live, further requests of the kind are refused rather than piled up.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.types import Fault, Request

logger = logging.getLogger(__name__)

MAX_COMPILING = 2
MAX_ABANDONED = 4


@dataclass(slots=True)
class _Job:
    request: Request
    started_at: float = 0.0
    is_done: bool = False
    is_abandoned: bool = False
    error: Fault | None = None


class Preparation:
    """Requests whose grammar is being compiled. All methods belong to the loop's thread.

    prepare   compiles; ValueError = the request's own fault
    forget    drops what `prepare` made for a request that will not run
    wake      called from the compiling thread when there is something to collect
    """

    def __init__(
        self,
        prepare: Callable[[Request], None],
        forget: Callable[[str], None],
        clock: Callable[[], float],
        timeout_s: float,
        wake: Callable[[], None],
    ) -> None:
        self._prepare, self._forget, self._clock = prepare, forget, clock
        self._timeout_s, self._wake = timeout_s, wake
        self._queued: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._lock = threading.Lock()
        self._num_abandoned = 0

    def __len__(self) -> int:
        return len(self._queued) + len(self._running)

    def add(self, request: Request) -> Fault | None:
        with self._lock:
            if self._num_abandoned >= MAX_ABANDONED:
                message = "structured output is busy with constraints that take too long; retry later"
                return Fault(503, message, "response_format", "grammar_busy")
        self._queued.append(_Job(request))
        self._start()
        return None

    def abort(self, request_id: str) -> bool:
        """True if the request was here; it will not come out."""
        for job in self._queued:
            if job.request.id == request_id:
                self._queued.remove(job)
                return True
        for job in self._running:
            if job.request.id == request_id:
                self._abandon(job)
                self._start()
                return True
        return False

    def collect(self) -> list[tuple[Request, Fault | None]]:
        """Requests that are ready (None) or failed, in the order in which they were taken up."""
        out: list[tuple[Request, Fault | None]] = []
        now = self._clock()
        for job in list(self._running):
            with self._lock:
                done = job.is_done
            if done:
                self._running.remove(job)
                out.append((job.request, job.error))
            elif now - job.started_at > self._timeout_s:
                self._abandon(job)
                out.append((job.request, _too_slow(self._timeout_s)))
        self._start()
        return out

    def _start(self) -> None:
        while self._queued and len(self._running) < MAX_COMPILING:
            job = self._queued.popleft()
            job.started_at = self._clock()
            self._running.append(job)
            threading.Thread(target=self._compile, args=(job,), daemon=True, name="braid-grammar").start()

    def _abandon(self, job: _Job) -> None:
        self._running.remove(job)
        with self._lock:
            job.is_abandoned = True
            self._num_abandoned += not job.is_done
            done = job.is_done
        if done:
            self._forget(job.request.id)

    def _compile(self, job: _Job) -> None:
        error: Fault | None = None
        try:
            self._prepare(job.request)
        except ValueError as problem:
            error = Fault(400, str(problem), "response_format")
        except Exception:
            logger.exception("a structured-output constraint could not be prepared")
            error = Fault(500, "the structured-output constraint could not be prepared", "response_format")
        with self._lock:
            job.is_done, job.error = True, error
            abandoned = job.is_abandoned
            self._num_abandoned -= abandoned
        if abandoned:
            self._forget(job.request.id)
        else:
            self._wake()


def _too_slow(timeout_s: float) -> Fault:
    return Fault(400, f"the structured-output constraint took more than {timeout_s:g} s to compile", "response_format")

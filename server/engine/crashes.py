"""How many engine crashes are too many, and what to call one."""

from __future__ import annotations

import signal
from collections import deque

MAX_RESTARTS, WINDOW_S = 5, 600.0


class CrashBudget:
    """At most `max_restarts` crashes in any `window_s` seconds: beyond that, a restart policy above us must decide."""

    def __init__(self, max_restarts: int = MAX_RESTARTS, window_s: float = WINDOW_S) -> None:
        self._max_restarts, self._window_s = max_restarts, window_s
        self._crashes: deque[float] = deque()

    def note(self, now: float) -> None:
        self._crashes.append(now)
        while now - self._crashes[0] > self._window_s:
            self._crashes.popleft()

    @property
    def is_spent(self) -> bool:
        return len(self._crashes) > self._max_restarts

    def __str__(self) -> str:
        return f"{len(self._crashes)} engine failures in {self._window_s / 60:g} minutes"


def describe_exit(code: int) -> str:
    """`by signal SIGKILL`, `with code 70`."""
    if code < 0:
        return f"by signal {signal.Signals(-code).name}"
    return f"with code {code}"

"""How long requests wait for their first step, and which of them have waited too long. No clock of its own."""

from __future__ import annotations


class Patience:
    """Waiting requests, oldest first: to look for one that is overdue costs nothing however many wait.

    A preempted request is not here any more: its client has seen text, or the machine is at work on it.
    """

    def __init__(self, timeout_s: float | None) -> None:
        """None = they wait for ever."""
        self.timeout_s = timeout_s
        self._since: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def add(self, request_id: str, now: float) -> None:
        if self.timeout_s is not None:
            self._since[request_id] = now

    def forget(self, request_id: str) -> None:
        """It was scheduled, or has ended. Idempotent."""
        self._since.pop(request_id, None)

    def expired(self, now: float) -> list[str]:
        """The requests that have waited longer than the limit; they are forgotten."""
        found = []
        for request_id, since in self._since.items():
            if self.timeout_s is None or now - since <= self.timeout_s:
                break
            found.append(request_id)
        for request_id in found:
            del self._since[request_id]
        return found

"""What the engine's clients catch: it takes no requests now, or it did not start."""

from __future__ import annotations

from server.engine.config import EngineState

RETRY_AFTER_S = 2.0


class EngineUnavailable(Exception):
    """The engine takes no requests now: HTTP 503. `retry_after_s` is a guess of when it will, None = never."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStartError(Exception):
    """The engine could not start: one line for a person."""


def refuse_if_unavailable(state: EngineState, is_draining: bool) -> None:
    """Raise EngineUnavailable unless a request can be taken in this state."""
    if is_draining:
        raise EngineUnavailable("the server is shutting down")
    if state is EngineState.DEAD:
        raise EngineUnavailable("the engine has failed")
    if state is EngineState.RESTARTING:
        raise EngineUnavailable("the engine is restarting", RETRY_AFTER_S)
    if state is EngineState.LOADING:
        raise EngineUnavailable("the engine is loading its model", RETRY_AFTER_S)

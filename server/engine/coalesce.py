"""When deltas cross to the front end, the joining of several deltas of one request into one, and of several models'
gauges.

A message costs the front end a wake-up, and each delta a detokenizer call and a socket write, on cores that the step
needs. Steps faster than the interval therefore share a message; a first token, a snapshot and an end never wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from scheduler.types import DecodingUsage, Delta, SpeculationUsage, StepStats
from server.engine.link import Update


def merge(deltas: Iterable[Delta]) -> Delta:
    """Several deltas of one request, in order, as one. At least one; only the last may be an end."""
    parts = list(deltas)
    if len(parts) == 1:
        return parts[0]
    last = parts[-1]
    return Delta(
        request_id=last.request_id,
        tokens=tuple(token for part in parts for token in part.tokens),
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        prompt_logprobs=tuple(logprob for part in parts for logprob in part.prompt_logprobs),
        finish_reason=last.finish_reason,
        stop_id=last.stop_id,
        cached_tokens=next((part.cached_tokens for part in parts if part.cached_tokens is not None), None),
        times=last.times,
        fault=last.fault,
        speculation=_sum_of([part.speculation for part in parts if part.speculation is not None]),
        decoding=_decoding_of([part.decoding for part in parts if part.decoding is not None]),
        # Each shows the block as it stands: the newest tells what the others did.
        snapshot=next((part.snapshot for part in reversed(parts) if part.snapshot is not None), None),
    )


def _sum_of(usages: list[SpeculationUsage]) -> SpeculationUsage | None:
    return sum(usages, start=SpeculationUsage()) if usages else None


def _decoding_of(usages: list[DecodingUsage]) -> DecodingUsage | None:
    return sum(usages, start=DecodingUsage()) if usages else None


def together(steps: Iterable[StepStats]) -> StepStats:
    """The last step of each model as one value: gauges are summed, counts are of the latest."""
    last = list(steps)
    if len(last) < 2:
        return last[0] if last else StepStats()
    return replace(
        last[-1],
        num_running=sum(stats.num_running for stats in last),
        num_waiting=sum(stats.num_waiting for stats in last),
        pages_used=sum(stats.pages_used for stats in last),
        pages_cached=sum(stats.pages_cached for stats in last),
        pages_total=sum(stats.pages_total for stats in last),
        oldest_waiting_s=max(stats.oldest_waiting_s for stats in last),
    )


class Outgoing:
    """Deltas and step stats on their way out.

    interval_s  tokens wait at most this long for company, counted from the last message
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._deltas: dict[str, list[Delta]] = {}
        self._steps: list[StepStats] = []
        self._sent_at = float("-inf")
        self._is_urgent = False

    def add(self, deltas: Iterable[Delta], stats: StepStats | None) -> None:
        for delta in deltas:
            # The first delta of a request carries cached_tokens; it is the time to first token. Who watches a block
            # fill wants to see each step.
            is_awaited = delta.cached_tokens is not None or delta.snapshot is not None
            self._is_urgent |= is_awaited or delta.finish_reason is not None
            self._deltas.setdefault(delta.request_id, []).append(delta)
        if stats is not None:
            self._steps.append(stats)

    def drop(self, request_id: str) -> None:
        self._deltas.pop(request_id, None)

    def is_due(self, now: float, next_step_s: float) -> bool:
        """True if what is held would be late after another step of `next_step_s`."""
        if not self._deltas and not self._steps:
            return False
        return self._is_urgent or now + next_step_s - self._sent_at >= self._interval_s

    def take(self, now: float) -> Update:
        """Everything held, as one message (possibly empty: a heartbeat)."""
        update = Update(tuple(merge(parts) for parts in self._deltas.values()), tuple(self._steps))
        self._deltas, self._steps, self._is_urgent, self._sent_at = {}, [], False, now
        return update

"""Who may enter: permits counted in requests and in prompt tokens, taken before any text is tokenized.

All or nothing: a call of n samples and p prompts gets n * p permits or none. What is held is always given back, by
`Permit.release`, exactly once.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from server.api.errors import ApiError, overloaded
from server.api.settings import ApiSettings
from server.engine.config import EngineInfo
from server.metrics import Metrics

MIN_RETRY_S, MAX_RETRY_S = 1, 30
RATE_WINDOW_S = 30.0
CALLS_OF_LOGPROBS = 4
"""Log-probabilities held at once, in calls that ask for as many as one may."""


class Permit:
    """What one call holds. `started` gives the prompt tokens back (they no longer wait), `release` everything."""

    def __init__(self, admission: Admission, num_requests: int, num_tokens: int) -> None:
        self._admission = admission
        self.num_requests = num_requests
        self.num_tokens = num_tokens
        self.num_logprobs = 0
        self._is_released = False

    def settle(self, num_tokens: int) -> None:
        """Replace the estimate by the real number of prompt tokens."""
        self._admission._change(0, num_tokens - self.num_tokens)
        self.num_tokens = num_tokens

    def started(self) -> None:
        self.settle(0)

    def hold_logprobs(self, count: int) -> None:
        """Raises ApiError 429 with Retry-After where all calls together would hold too many."""
        self._admission.admit_logprobs(count)
        self.num_logprobs += count

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._admission.num_logprobs -= self.num_logprobs
            self._admission._change(-self.num_requests, -self.num_tokens)
            self._admission._count_end(self.num_requests)


class Admission:
    """The counters and limits of one model. A call is let in when its requests fit, and when its tokens fit or none are
    waiting."""

    def __init__(self, settings: ApiSettings, info: Callable[[], EngineInfo], metrics: Metrics) -> None:
        self._settings, self._info = settings, info
        self.num_requests = self.num_tokens = self.num_logprobs = 0
        self._metrics = metrics
        self._ends: list[tuple[float, int]] = []

    @property
    def max_requests(self) -> int:
        info = self._info()
        asked = self._settings.max_requests
        return info.max_seqs + info.max_queued_requests if asked is None else asked

    @property
    def max_tokens(self) -> int:
        asked = self._settings.max_queued_tokens
        return self._info().max_queued_tokens if asked is None else asked

    def admit(self, num_requests: int, num_tokens: int) -> Permit:
        """Raises ApiError 429 with Retry-After."""
        if self.num_requests + num_requests > self.max_requests:
            excess = self.num_requests + num_requests - self.max_requests
            raise self._refusal("max_num_queued_reqs", f"{self.num_requests} requests are being served", excess)
        if self.num_tokens and self.num_tokens + num_tokens > self.max_tokens:
            raise self._refusal("max_num_queued_tokens", f"{self.num_tokens} prompt tokens are waiting", num_requests)
        self._change(num_requests, num_tokens)
        return Permit(self, num_requests, num_tokens)

    def admit_logprobs(self, count: int) -> None:
        """Raises ApiError 429; the caller counts them back."""
        if count and self.num_logprobs + count > CALLS_OF_LOGPROBS * self._settings.limits.max_logprob_entries:
            raise self._refusal("max_logprob_entries", f"{self.num_logprobs} log-probabilities may be due", 1)
        self.num_logprobs += count

    def _refusal(self, reason: str, state: str, excess: int) -> ApiError:
        self._metrics.count_rejection(reason)
        retry_after = self.retry_after(excess)
        return overloaded(f"the server is at its limit: {state}. Try again in {retry_after} s.", retry_after)

    def retry_after(self, excess: int) -> int:
        """Seconds until `excess` requests will probably have ended, with jitter so that refused clients spread out."""
        now = time.monotonic()
        self._ends = [(when, count) for when, count in self._ends if now - when < RATE_WINDOW_S]
        ended = sum(count for _, count in self._ends)
        wait = excess * RATE_WINDOW_S / ended if ended else 2.0
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(wait * random.uniform(1.0, 1.5))))

    def _change(self, requests: int, tokens: int) -> None:
        self.num_requests += requests
        self.num_tokens += tokens
        self._metrics.observe_held(self.num_requests)

    def _count_end(self, num_requests: int) -> None:
        self._ends.append((time.monotonic(), num_requests))
        if len(self._ends) > 4096:
            del self._ends[:2048]

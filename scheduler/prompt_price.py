"""What a prompt row is worth in output tokens: those a prompt unlocks, over its length (speculative reference 3.4).

A mean over finished requests, in [0.05, 1]. At 0, the myopic rule, drafts that displace prompts look free.
"""

from __future__ import annotations

from scheduler.sequence import Sequence

_BOUNDS = (0.05, 1.0)
_FIRST = 0.3
_RATE = 0.05


class PromptPrice:
    """fixed: the price, whatever is learned; None = as learned."""

    def __init__(self, fixed: float | None = None) -> None:
        self._fixed = fixed
        self._output, self._prompt = _FIRST, 1.0

    @property
    def value(self) -> float:
        if self._fixed is not None:
            return self._fixed
        lowest, highest = _BOUNDS
        return min(highest, max(lowest, self._output / self._prompt))

    def learn(self, seq: Sequence) -> None:
        """Take in a finished sequence."""
        computed = len(seq.request.prompt) - seq.cached_tokens
        self._output += _RATE * (seq.num_output - self._output)
        self._prompt += _RATE * (computed - self._prompt)

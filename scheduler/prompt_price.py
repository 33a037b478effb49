"""What finished requests teach: what a prompt row is worth, and how likely a text is to go on.

A prompt row is worth the output tokens that a prompt unlocks, over its length (speculative reference 3.4): a mean over
finished requests, in [0.05, 1]. At 0, the myopic rule, drafts that displace prompts look free.
"""

from __future__ import annotations

from scheduler.sequence import Sequence
from scheduler.types import FinishReason

_BOUNDS = (0.05, 1.0)
_FIRST = 0.3
_RATE = 0.05


class PromptPrice:
    """fixed: the price, whatever is learned; None = as learned."""

    def __init__(self, fixed: float | None = None) -> None:
        self._fixed = fixed
        self._output, self._prompt, self._ends = _FIRST, 1.0, 0.0

    @property
    def value(self) -> float:
        if self._fixed is not None:
            return self._fixed
        lowest, highest = _BOUNDS
        return min(highest, max(lowest, self._output / self._prompt))

    @property
    def lasts(self) -> float:
        """Probability that an output token is not the last one, but for the ends by length, which are known ahead."""
        return 1.0 - self._ends / max(1.0, self._output)

    def learn(self, seq: Sequence) -> None:
        """Take in a finished sequence."""
        computed = len(seq.request.prompt) - seq.cached_tokens
        self._output += _RATE * (seq.num_output - self._output)
        self._prompt += _RATE * (computed - self._prompt)
        self._ends += _RATE * ((seq.finish_reason is FinishReason.STOP) - self._ends)

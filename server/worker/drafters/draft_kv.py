"""How far a draft model's own KV reaches in each sequence, and which part of a backlog is fed next.

The KV of a draft model lags whenever its sequence ran without it (no drafts wanted, a prompt just read, a prefix hit):
nothing is lost, the next call feeds the tokens in between. A prompt may be long, so a backlog is worked off in bounded
pieces. Validity is known by the tokens: a key is valid if the token it was written for is the sequence's token there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Reach:
    """num_valid: tokens from the front whose keys are right; tail: tokens whose keys were written behind these."""

    num_valid: int = 0
    tail: list[int] = field(default_factory=list)


class DraftKV:
    """Positions only; the pages are the pool's."""

    def __init__(self, catch_up_tokens: int, near: int) -> None:
        """catch_up_tokens: most backlog fed in one step, over all sequences. near: a lag no longer than this is what
        one verified step leaves behind; it is fed at once and does not count as backlog."""
        self._catch_up_tokens, self._near = catch_up_tokens, near
        self._reach: dict[int, _Reach] = {}

    def __len__(self) -> int:
        return len(self._reach)

    def num_valid(self, seq_id: int, tokens: Sequence[int]) -> int:
        """Tokens at the front of `tokens` whose draft keys are right; the last token never counts: it must be fed."""
        reach = self._reach.setdefault(seq_id, _Reach())
        agreed = 0
        for written, token in zip(
            reach.tail, tokens[reach.num_valid : reach.num_valid + len(reach.tail)], strict=False
        ):
            if written != token:
                break
            agreed += 1
        reach.num_valid = min(reach.num_valid + agreed, len(tokens) - 1)
        reach.tail = []
        return reach.num_valid

    def feed_sizes(self, lags: Sequence[int]) -> list[int]:
        """How many tokens of each lag are fed in this step: all of a short one, a share of the budget of a long one.

        The shortest backlogs first: most sequences come to drafting soonest.
        """
        sizes = [lag if lag <= self._near else 0 for lag in lags]
        left = self._catch_up_tokens
        for index in sorted((i for i, lag in enumerate(lags) if lag > self._near), key=lags.__getitem__):
            sizes[index] = min(left, lags[index])
            left -= sizes[index]
        return sizes

    def fed(self, seq_id: int, num_valid: int) -> None:
        """Committed tokens were fed: the first `num_valid` keys are right now."""
        self._reach[seq_id] = _Reach(num_valid)

    def drafted(self, seq_id: int, tokens: Sequence[int]) -> None:
        """Keys of these tokens, which may or may not be accepted, stand behind the valid ones."""
        self._reach[seq_id].tail = list(tokens)

    def release(self, seq_id: int) -> None:
        self._reach.pop(seq_id, None)

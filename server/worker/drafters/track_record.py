"""What drafters' offers came to, so that the composite compares what they are worth and not what they claim.

Every offer is judged by the tokens that followed, taken or not, so a drafter that is never chosen can win back trust.
Per drafter and per request there are decayed sums of tokens claimed and tokens that were right, and

    worth = claimed tokens * (right of the request + W * right of the drafter) / (claimed of the request + W * claimed)

The scheduler corrects the claims of the offer it gets by its own, finer counts (`scheduler/acceptance.py`); these here
only choose among drafters.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.types import Drafts

DECAY_ALL, DECAY_REQUEST = 0.998, 0.9
PRIOR_CLAIMED = 20.0
"""Tokens that a drafter's claims are believed for before anything is known of it."""
WEIGHT = 4.0
"""Tokens that the drafter's record counts for in a request's."""


class _Sums:
    __slots__ = ("claimed", "right")

    def __init__(self, claimed: float) -> None:
        self.claimed = self.right = claimed

    def add(self, claimed: float, right: int, decay: float) -> None:
        self.claimed = self.claimed * decay + claimed
        self.right = self.right * decay + right


class _Sequence:
    """One sequence: its sums by drafter, and the offers made behind its first `length` tokens."""

    __slots__ = ("length", "offers", "sums")

    def __init__(self) -> None:
        self.sums: dict[str, _Sums] = {}
        self.length = 0
        self.offers: dict[str, Drafts] = {}


class TrackRecord:
    """The records of all drafters."""

    def __init__(self) -> None:
        self._all: dict[str, _Sums] = {}
        self._by_seq: dict[int, _Sequence] = {}

    def settle(self, seq_id: int, tokens: Sequence[int]) -> None:
        """Judge the offers that the sequence got last, now that more of its tokens are known. Once for each."""
        known = self._by_seq.get(seq_id)
        if known is None or not known.offers or len(tokens) <= known.length:
            return
        new = tokens[known.length :]
        for name, offer in known.offers.items():
            # Beyond the new tokens nobody knows.
            right, claimed = num_right(offer, new)
            self._of(name).add(claimed, right, DECAY_ALL)
            sums = known.sums.get(name)
            if sums is None:
                sums = known.sums[name] = _Sums(0.0)
            sums.add(claimed, right, DECAY_REQUEST)
        known.offers = {}

    def remember(self, seq_id: int, length: int, offer: Drafts) -> None:
        """An offer to be judged later, made behind the sequence's first `length` tokens."""
        known = self._by_seq.get(seq_id)
        if known is None:
            known = self._by_seq[seq_id] = _Sequence()
        if known.length != length:
            known.length, known.offers = length, {}
        known.offers[offer.source] = offer

    def trust(self, seq_id: int, name: str) -> float:
        """Tokens that were right for each that was claimed, of a drafter for a sequence."""
        drafter = self._of(name)
        rate = drafter.right / drafter.claimed
        known = self._by_seq.get(seq_id)
        sums = known.sums.get(name) if known is not None else None
        return rate if sums is None else (sums.right + WEIGHT * rate) / (sums.claimed + WEIGHT)

    def release(self, seq_id: int) -> None:
        self._by_seq.pop(seq_id, None)

    def _of(self, name: str) -> _Sums:
        sums = self._all.get(name)
        if sums is None:
            sums = self._all[name] = _Sums(PRIOR_CLAIMED)
        return sums


def num_right(offer: Drafts, new: Sequence[int]) -> tuple[int, float]:
    """How many of an offer's drafts are the tokens that followed, and how many were claimed within their number."""
    right, node, claimed = 0, -1, 0.0
    if not offer.parents:
        for token, draft in zip(new, offer.tokens, strict=False):
            if token != draft:
                break
            right += 1
        return right, sum(offer.survivals[: len(new)])
    depths: list[int] = []
    for i, (draft, survival, parent) in enumerate(zip(offer.tokens, offer.survivals, offer.parents, strict=True)):
        depth = depths[parent] + 1 if parent >= 0 else 1
        depths.append(depth)
        if depth <= len(new):
            claimed += survival
            if parent == node and right < len(new) and draft == new[right]:
                node, right = i, right + 1
    return right, claimed

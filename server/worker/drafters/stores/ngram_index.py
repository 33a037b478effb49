"""Where the n-grams of one text ended: an incremental hash index, O(1) per token, never a rescan.

Keys are hashes of tuples; a collision costs nothing but time, because every find compares the tokens themselves. The
index may lag behind its text: what is not indexed is not found.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

SHORT, LONG = 2, 4
"""Lengths of the indexed n-grams: without a short one there is no match, a long one says where to look first."""
MAX_MATCH = 32
"""Matches are measured up to this length; beyond it they say nothing more."""
_FEW = 4
"""Up to this many new n-grams are hashed one by one, more of them column by column."""
MAX_SPOTS = 4
"""Occurrences looked at, most recent first."""
BYTES_PER_TOKEN = 220
"""Two dictionary entries with their keys and two links; measured with tracemalloc on random text."""


class Spot(NamedTuple):
    """An occurrence of a tail: it ended before text[at], and its last `match` tokens are the same."""

    at: int
    match: int


class _Order:
    """Where the n-grams of one length ended: the last time, and from each time back to the one before."""

    __slots__ = ("before", "last", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.last: dict[int, int] = {}
        self.before = array("i")

    def learn(self, text: Sequence[int], start: int, end: int) -> None:
        last, before = self.last, self.before
        for position, key in enumerate(_keys(text, start, end, self.length), start):
            before.append(last.get(key, -1))
            last[key] = position


class NgramIndex:
    """The index of one text. `num_indexed`: n-grams that end before this position are known."""

    __slots__ = ("_long", "_short", "num_indexed")

    def __init__(self) -> None:
        self._short, self._long = _Order(SHORT), _Order(LONG)
        self.num_indexed = 0

    @property
    def num_bytes(self) -> int:
        return BYTES_PER_TOKEN * self.num_indexed

    def learn(self, text: Sequence[int], end: int, most: int) -> int:
        """Index the n-grams that end before `end`, at most `most` of them; returns how many tokens were taken in."""
        start = self.num_indexed
        end = min(end, start + most)
        if end <= start:
            return 0
        self._short.learn(text, start, end)
        self._long.learn(text, start, end)
        self.num_indexed = end
        return end - start

    def find(self, text: Sequence[int], tail: Sequence[int]) -> list[Spot]:
        """Occurrences in `text` of the longest indexed n-gram that ends `tail`, the longest match first.

        tail  the tokens to be continued; may be `text` itself; of the same type (list or tuple) as `text`
        """
        length = len(tail)
        if length < SHORT or (position := self._short.last.get(hash(tuple(tail[length - SHORT :])), -1)) < 0:
            return []
        if length >= LONG:
            key = hash(tuple(tail[length - LONG :]))
            spots = _spots(text, tail, self._long, self._long.last.get(key, -1))
            if spots:
                return spots
        return _spots(text, tail, self._short, position)


def _spots(text: Sequence[int], tail: Sequence[int], order: _Order, position: int) -> list[Spot]:
    """The occurrences at `position` and before it, the longest match first."""
    before, num_continued = order.before, len(text) - 1
    # A step that is run again may bring fewer tokens than are indexed.
    while position >= num_continued:
        position = before[position]
    spots: list[Spot] = []
    for _ in range(MAX_SPOTS):
        if position < 0:
            break
        match = _match(text, position, tail, order.length)
        if match:
            spots.append(Spot(position + 1, match))
        position = before[position]
    if len(spots) > 1:
        spots.sort(key=_by_match, reverse=True)
    return spots


def _by_match(spot: Spot) -> int:
    return spot.match


def _match(text: Sequence[int], position: int, tail: Sequence[int], order: int) -> int:
    """Tokens that text[.. position] and `tail` have in common at their ends, up to MAX_MATCH; 0 if below `order`."""
    length = len(tail)
    if position < order - 1 or text[position - order + 1 : position + 1] != tail[length - order :]:
        return 0
    most = min(MAX_MATCH, position + 1, length)
    if most == MAX_MATCH and text[position - MAX_MATCH + 1 : position + 1] == tail[length - MAX_MATCH :]:
        return MAX_MATCH
    match = order
    while match < most and text[position - match] == tail[length - 1 - match]:
        match += 1
    return match


def _keys(text: Sequence[int], start: int, end: int, order: int) -> list[int]:
    """Hash of the n-gram that ends at each position start .. end - 1; 0 where the text is too short."""
    if end - start <= _FEW:
        return [hash(tuple(text[at - order : at])) if at >= order else 0 for at in range(start + 1, end + 1)]
    first = start - order + 1
    missing = min(max(0, -first), end - start)
    first += missing
    columns = [text[first + i : end - order + 1 + i] for i in range(order)]
    return [0] * missing + list(map(hash, zip(*columns, strict=True)))

"""Where the n-grams of one text ended: an incremental hash index, O(1) per token, never a rescan.

Keys are hashes of tuples; a collision costs nothing but time, because every find compares the tokens themselves. The
index may lag behind its text: what is not indexed is not found.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

ORDERS = (8, 4, 2)
"""Lengths of the indexed n-grams, longest first: a find tries each until one occurs."""
MAX_MATCH = 32
"""Matches are measured up to this length; beyond it they say nothing more."""
MAX_SPOTS = 4
"""Occurrences looked at, most recent first."""
BYTES_PER_TOKEN = 300
"""Three dictionary entries with their keys and three links; measured with tracemalloc on random text."""


class Spot(NamedTuple):
    """An occurrence of a tail: it ended before text[at], and its last `match` tokens are the same."""

    at: int
    match: int


class NgramIndex:
    """The index of one text. `num_indexed`: n-grams that end before this position are known."""

    def __init__(self) -> None:
        self._last: tuple[dict[int, int], ...] = ({}, {}, {})
        self._before: tuple[array[int], ...] = (array("i"), array("i"), array("i"))
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
        for last, before, order in zip(self._last, self._before, ORDERS, strict=True):
            for position, key in enumerate(_keys(text, start, end, order), start):
                before.append(last.get(key, -1))
                last[key] = position
        self.num_indexed = end
        return end - start

    def find(self, text: Sequence[int], tail: Sequence[int]) -> list[Spot]:
        """Occurrences in `text` of the longest indexed n-gram that ends `tail`, the longest match first.

        tail  the tokens to be continued; may be `text` itself; of the same type (list or tuple) as `text`
        """
        length, num_continued = len(tail), len(text) - 1
        for last, before, order in zip(self._last, self._before, ORDERS, strict=True):
            if length < order:
                continue
            position = last.get(hash(tuple(tail[length - order :])), -1)
            # A step that is run again may bring fewer tokens than are indexed.
            while position >= num_continued:
                position = before[position]
            spots: list[Spot] = []
            for _ in range(MAX_SPOTS):
                if position < 0:
                    break
                match = _match(text, position, tail, order)
                if match >= order:
                    spots.append(Spot(position + 1, match))
                position = before[position]
            if spots:
                spots.sort(key=_by_match, reverse=True)
                return spots
        return []


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
    first = start - order + 1
    missing = min(max(0, -first), end - start)
    first += missing
    columns = [text[first + i : end - order + 1 + i] for i in range(order)]
    return [0] * missing + list(map(hash, zip(*columns, strict=True)))

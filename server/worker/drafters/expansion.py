"""Best-first expansion: the one routine that turns "what may follow here" into a chain or a tree of drafts.

With one child per place it walks a chain; with more it grows DySpec's greedy tree (best survival first). What a place
is, only its source knows; the routine carries it from parent to children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from scheduler.types import Drafts

Child = tuple[float, int, Any]
"""(probability that the target picks it once its parent is accepted, token, place behind it)."""
Children = Callable[[Any], Sequence[Child]]
"""From a place to what may follow it, most likely first; the probabilities sum to at most 1."""


Line = tuple[tuple[int, ...], tuple[float, ...]]
"""A chain of tokens and the survival of each."""


class Walk(NamedTuple):
    """Where a sequence's drafts begin, and how to go on from each place.

    line  the chain that `best_first` would walk, given (most drafts, floor), where the source has it at hand: a slice
          of a text instead of a call per token. None, or an answer of None: ask for children
    """

    place: Any
    children: Children
    line: Callable[[int, float], Line | None] | None = None


def best_first(walk: Walk, most: int, width: int, floor: float, source: str) -> Drafts | None:
    """Grow drafts from `walk`, most likely first.

    most   most drafts; width: most children of a place, 1 = a chain
    floor  no draft whose survival is below this
    Survivals never rise along the result and parents come before children: a child enters the heap when its parent
    leaves it, with a survival no higher. None if nothing is worth offering.
    """
    if width == 1 and walk.line is not None and (line := walk.line(most, floor)) is not None:
        return Drafts(*line, source) if line[0] else None
    tokens: list[int] = []
    survivals: list[float] = []
    parents: list[int] = []
    heap: list[tuple[float, int, int, int, Any]] = []
    place, children, survival, parent, order = walk.place, walk.children, 1.0, -1, 0
    while len(tokens) < most:
        found = children(place)
        if not heap and found and (width == 1 or len(found) == 1):
            # Nothing to choose from: the usual case of a chain, and three times as fast without the heap.
            probability, token, place = found[0]
            survival *= probability
            if survival < floor:
                break
            above = parent
        else:
            for probability, token, behind in found if len(found) <= width else found[:width]:
                if survival * probability >= floor:
                    # `order` breaks ties, oldest first, and keeps places from being compared.
                    heappush(heap, (-survival * probability, order, parent, token, behind))
                    order += 1
            if not heap:
                break
            negative, _, above, token, place = heappop(heap)
            survival = -negative
        parent = len(tokens)
        tokens.append(token)
        survivals.append(survival)
        parents.append(above)
    if not tokens:
        return None
    return Drafts(tuple(tokens), tuple(survivals), source, tuple(parents) if width > 1 else ())

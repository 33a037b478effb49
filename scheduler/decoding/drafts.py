"""Draft trees and chains as integers: what may be verified of an offer, and which part of a span was accepted."""

from __future__ import annotations

from scheduler.speculation import MAX_TREE_NODES
from scheduler.types import Drafts, Span


def is_well_formed(drafts: Drafts) -> bool:
    """Whether any cut of the offer can be verified: drafters are not trusted.

    Survivals in (0, 1] and never rising, as many as tokens; parents before their children; no more than a mask holds.
    """
    tokens, survivals, _, parents = drafts
    if not tokens or len(survivals) != len(tokens):
        return False
    previous = 1.0
    for survival in survivals:
        if not 0.0 < survival <= previous:
            return False
        previous = survival
    if not parents:
        return True
    if len(parents) != len(tokens) or len(tokens) >= MAX_TREE_NODES:
        return False
    return all(-1 <= parent < node for node, parent in enumerate(parents))


def chain_length(drafts: Drafts) -> int:
    """How many of the first drafts follow each other without a branch."""
    for node, parent in enumerate(drafts.parents):
        if parent != node - 1:
            return node
    return len(drafts.tokens)


def span_parents(drafts: Drafts, num_drafts: int) -> tuple[int, ...]:
    """`Span.parents` for the first drafts of an offer; () if they form a chain."""
    if chain_length(drafts) >= num_drafts:
        return ()
    return (-1, *(parent + 1 for parent in drafts.parents[:num_drafts]))


def accepted_path(span: Span, answer: tuple[int, ...]) -> tuple[int, ...] | None:
    """Offsets in a VERIFY span of the drafts that `answer` (accepted tokens and one more) accepts, root excluded.

    None if it is no answer to the span: empty, or its accepted tokens are not a path of drafts from the root.
    """
    tokens, parents = span.tokens, span.parents
    num_accepted = len(answer) - 1
    if not parents:
        fits = 0 <= num_accepted < len(tokens) and answer[:-1] == tokens[1 : num_accepted + 1]
        return tuple(range(1, num_accepted + 1)) if fits else None
    if num_accepted < 0:
        return None
    path: list[int] = []
    node = 0
    for token in answer[:-1]:
        children = (i for i in range(node + 1, len(tokens)) if parents[i] == node and tokens[i] == token)
        node = next(children, 0)
        if node == 0:
            return None
        path.append(node)
    return tuple(path)

"""What an offer must be before anybody acts on it: well-formed, and legal under its request's grammar."""

from __future__ import annotations

from scheduler.types import MAX_TREE_NODES, Drafts
from server.worker.drafters.base import Want


def flaw(offer: Drafts, want: Want, vocab_size: int) -> str | None:
    """What is wrong with an offer by the rules of `scheduler.types.Drafts`; None = nothing."""
    tokens, survivals, parents = offer.tokens, offer.survivals, offer.parents
    if not tokens or len(survivals) != len(tokens):
        return "no tokens, or not one survival for each"
    if len(tokens) > want.num_drafts:
        return "more drafts than asked for"
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        return "a token out of the vocabulary"
    # Written so that a NaN is a flaw: it compares false.
    if not (survivals[0] <= 1.0 and survivals[-1] > 0.0 and all(map(float.__ge__, survivals, survivals[1:]))):
        return "survivals that rise or are no probabilities"
    return _tree_flaw(tokens, parents, want.tree) if parents else None


def _tree_flaw(tokens: tuple[int, ...], parents: tuple[int, ...], allowed: bool) -> str | None:
    if not allowed or len(tokens) >= MAX_TREE_NODES:
        return "a tree where none is allowed, or too large"
    if len(parents) != len(tokens) or any(not -1 <= parent < i for i, parent in enumerate(parents)):
        return "parents that are not drafts before their children"
    if len(set(zip(parents, tokens, strict=True))) < len(tokens):
        return "two equal children of one parent"
    return None


def legal_part(offer: Drafts, want: Want) -> Drafts | None:
    """The drafts that the request's grammar allows; what stands behind an illegal one goes with it. None = none."""
    matcher = want.state.matcher
    if matcher is None:
        return offer
    if not offer.parents:
        num_legal = matcher.num_legal(want.tokens, offer.tokens)
        if num_legal == 0:
            return None
        return Drafts(offer.tokens[:num_legal], offer.survivals[:num_legal], offer.source)
    paths: list[list[int]] = []
    kept: dict[int, int] = {-1: -1}
    for node, (token, parent) in enumerate(zip(offer.tokens, offer.parents, strict=True)):
        path = [*(paths[parent] if parent >= 0 else ()), token]
        paths.append(path)
        if parent in kept and matcher.num_legal(want.tokens, path) == len(path):
            kept[node] = len(kept) - 1
    nodes = [node for node in kept if node >= 0]
    if not nodes:
        return None
    return Drafts(
        tuple(offer.tokens[node] for node in nodes),
        tuple(offer.survivals[node] for node in nodes),
        offer.source,
        tuple(kept[offer.parents[node]] for node in nodes),
    )

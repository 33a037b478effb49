"""Which of the target's layers draft: fixed in advance, searched for, or an early exit.

Scores are learnt while serving: the share of a text's positions at which the layers alone choose the token that the
whole model chooses, on the last tokens that some sequence emitted. One candidate is scored at a time, on a bounded
number of rows and on pages of its own: no sequence's KV is touched and no text depends on it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

Layers = tuple[int, ...]
SKIPPED = 0.45
"""Share of the layers that `search` leaves out, as the released SWIFT code does."""
STALE = 300
"""`search` ends after so many scores in a row without a better subset; SWIFT's value."""
MOST_TALLIES = 256


@dataclass(slots=True)
class Tally:
    """Positions at which a subset agreed with the whole model, of those seen. It starts as one of two."""

    agreed: float = 1.0
    seen: float = 2.0

    @property
    def share(self) -> float:
        return self.agreed / self.seen

    def add(self, agreed: int, seen: int, memory: float = 1.0) -> None:
        """memory below 1: older scores fade, because texts change."""
        self.agreed = self.agreed * memory + agreed
        self.seen = self.seen * memory + seen


class LayerChoice(Protocol):
    """A source of layers."""

    layers: Layers
    """Ascending, not empty."""
    most_drafts: int
    """Drafts in a row that are worth making with them."""

    def candidate(self) -> Layers | None:
        """The layers to score next; None = nothing is left to learn."""
        ...

    def learn(self, candidate: Layers, agreed: int, seen: int) -> None:
        """A candidate's score on one text."""
        ...


class Uniform:
    """Evenly spaced middle layers are left out, always the same: Liu et al., "Unified Layer Skipping" (2024)."""

    def __init__(self, num_layers: int, share: float, most_drafts: int) -> None:
        """share: of the layers to skip, in [0, 1); first and last layer stay."""
        self.layers, self.most_drafts = evenly(num_layers, share), most_drafts

    def candidate(self) -> Layers | None:
        return None

    def learn(self, candidate: Layers, agreed: int, seen: int) -> None:
        pass


def evenly(num_layers: int, share: float) -> Layers:
    """Layers that stay when about `share` of them, evenly spaced between the first and the last, are left out."""
    num_middle = max(0, num_layers - 2)
    num_skipped = min(round(share * num_layers), num_middle)
    skipped = {1 + int((i + 0.5) * num_middle / num_skipped) for i in range(num_skipped)}
    return tuple(index for index in range(num_layers) if index not in skipped)


class Search:
    """The subset of one size that agrees most, by local search: Xia et al., "SWIFT" (2024).

    Departures: whole layers, not halves of layers; a new candidate swaps one layer of the best so far, instead of being
    drawn at random with a Gaussian process now and then; scores add up over texts; agreement is with the whole model on
    the same text, not with what was sampled.
    """

    def __init__(self, num_layers: int, most_drafts: int, seed: int = 0) -> None:
        self._num_layers, self.most_drafts = num_layers, most_drafts
        self.layers = evenly(num_layers, SKIPPED)
        self._tallies: dict[Layers, Tally] = {self.layers: Tally()}
        self._rng = random.Random(seed)
        self._num_stale = 0

    def candidate(self) -> Layers | None:
        """Every other time the best so far, so that a lucky text does not keep it there."""
        if self._num_stale >= STALE or self._num_layers <= 2 or len(self.layers) == self._num_layers:
            return None
        if self._num_stale % 2:
            return self.layers
        skipped = [i for i in range(1, self._num_layers - 1) if i not in self.layers]
        kept = [i for i in self.layers if 0 < i < self._num_layers - 1]
        if not kept:
            return None
        out, back = self._rng.choice(kept), self._rng.choice(skipped)
        return tuple(sorted({*self.layers, back} - {out}))

    def learn(self, candidate: Layers, agreed: int, seen: int) -> None:
        self._tallies.setdefault(candidate, Tally()).add(agreed, seen)
        best = max(self._tallies, key=lambda layers: self._tallies[layers].share)
        self._num_stale = 0 if best != self.layers else self._num_stale + 1
        self.layers = best
        if len(self._tallies) > MOST_TALLIES:
            del self._tallies[min(self._tallies, key=lambda layers: self._tallies[layers].share)]


class Exit:
    """The first layers, then the final norm and the head: Entezari Zarch et al., "DEL" (2025).

    The depth l and the number of drafts d are those with the most tokens per layer run,
    ((1 - a^(d+1)) / (1 - a)) / (d l + L), a being how often layer l agrees with the whole model. Departure: agreement
    is scored on texts beside serving, one depth at a time, not from hidden states kept of verified rows.
    """

    _MEMORY = 0.95

    def __init__(self, num_layers: int, most_drafts: int) -> None:
        self._num_layers, self._most = num_layers, most_drafts
        depths = range(1, max(2, num_layers))
        self._tallies = {depth: Tally() for depth in depths}
        self._turn = 0
        self.layers, self.most_drafts = tuple(range(max(1, num_layers // 2))), most_drafts

    def candidate(self) -> Layers | None:
        depths = list(self._tallies)
        return tuple(range(depths[self._turn % len(depths)]))

    def learn(self, candidate: Layers, agreed: int, seen: int) -> None:
        self._turn += 1
        self._tallies[len(candidate)].add(agreed, seen, self._MEMORY)
        depth, self.most_drafts = self._best()
        self.layers = tuple(range(depth))

    def _best(self) -> tuple[int, int]:
        options = ((depth, drafts) for depth in self._tallies for drafts in range(1, self._most + 1))
        return max(options, key=lambda option: self.tokens_per_layer(*option))

    def tokens_per_layer(self, depth: int, drafts: int) -> float:
        share = min(self._tallies[depth].share, 0.999)
        return (1 - share ** (drafts + 1)) / (1 - share) / (drafts * depth + self._num_layers)


def make_choice(source: str, num_layers: int, most_drafts: int) -> LayerChoice:
    """The source of a configuration: uniform:<share skipped>, search or exit. Raises ValueError for any other."""
    kind, _, share = source.partition(":")
    if kind == "uniform":
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1:
            raise ValueError(
                f"layer_subset is {source!r}; expected uniform:<share of layers skipped, from 0 to below 1>"
            )
        return Uniform(num_layers, value, most_drafts)
    if source == "search":
        return Search(num_layers, most_drafts)
    if source == "exit":
        return Exit(num_layers, most_drafts)
    raise ValueError(f"layer_subset is {source!r}; expected uniform:<share>, search or exit")


def text_to_score(texts: Collection[tuple[Sequence[int], int]], max_tokens: int) -> tuple[list[int], int] | None:
    """The last `max_tokens` of the text with the longest output, and where its output begins there.

    texts  (tokens, number of prompt tokens). None if no output is long enough to tell anything.
    """
    tokens, num_prompt = max(texts, key=lambda text: len(text[0]) - text[1])
    window = list(tokens[-max_tokens:])
    start = max(1, num_prompt - (len(tokens) - len(window)))
    return (window, start) if len(window) - start >= 4 else None

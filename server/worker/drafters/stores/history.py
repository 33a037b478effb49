"""`history` (prompt lookup): what followed the last time this sequence's latest tokens stood in it.

Source: Saxena, "Prompt Lookup Decoding" (2023). Departures: an incremental index instead of a scan, all recent
occurrences instead of the first, and a continuation that reaches the end of the text goes on with its own beginning,
so that a periodic text is continued for as long as one likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from scheduler.types import MAX_TREE_NODES
from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Child, Line, Walk
from server.worker.drafters.stores.ngram_index import BYTES_PER_TOKEN, MAX_MATCH, NgramIndex, Spot
from server.worker.sequences import SequenceState


class HistoryStore:
    name = "history"
    needs_top = 0

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        """max_bytes: of all sequences' indexes together; beyond it no more of any text is taken in until some go."""
        self._indexes: dict[int, NgramIndex] = {}
        self._max_tokens, self._num_tokens = max_bytes // BYTES_PER_TOKEN, 0

    def learn(self, want: Want, most: int) -> int:
        index = self._indexes.get(want.seq_id)
        if index is None:
            index = self._indexes[want.seq_id] = NgramIndex()
        # The n-gram that ends at the last token has no continuation yet.
        taken = index.learn(want.tokens, len(want.tokens) - 1, min(most, self._max_tokens - self._num_tokens))
        self._num_tokens += taken
        return taken

    def begin(self, want: Want) -> Walk | None:
        spots = self.find(want)
        return continuations(want.tokens, spots) if spots else None

    def find(self, want: Want) -> list[Spot]:
        """Where the sequence's latest tokens stood before, the longest match first."""
        index = self._indexes.get(want.seq_id)
        return index.find(want.tokens, want.tokens) if index is not None else []

    def release(self, seq_id: int, state: SequenceState) -> None:
        index = self._indexes.pop(seq_id, None)
        if index is not None:
            self._num_tokens -= index.num_indexed

    @property
    def num_bytes(self) -> int:
        return BYTES_PER_TOKEN * self._num_tokens


def continuations(text: Sequence[int], spots: Sequence[Spot], end: int | None = None) -> Walk:
    """Walk on from where a sequence's tail stands in a text; spots that disagree make branches.

    end  token behind which nothing is said, the text's last one too; None = it is the sequence's own text: a
         continuation that reaches its end goes round, its period is what lies behind its origin
    """
    best, length = spots[0].match, len(text)
    # Shorter matches than the best say little beside it.
    origins = tuple(spot.at for spot in spots if 2 * spot.match >= best)

    def children(place: tuple[int, tuple[int, ...]]) -> list[Child]:
        depth, origins = place
        sure = CERTAINTY[best + depth]
        tokens = [text[origin + depth % (length - origin)] for origin in origins]
        if tokens.count(tokens[0]) == len(tokens) and tokens[0] != end:
            return [(sure, tokens[0], (depth + 1, origins))]
        groups: dict[int, list[int]] = {}
        for token, origin in zip(tokens, origins, strict=True):
            if token == end:
                continue
            groups.setdefault(token, []).append(origin)
        # Equal shares: the most recent first, because `origins` is in that order and the sort is stable.
        ranked = sorted(groups.items(), key=_by_votes, reverse=True)
        return [(sure * len(group) / len(tokens), token, (depth + 1, tuple(group))) for token, group in ranked]

    def line(most: int, floor: float) -> Line | None:
        tokens = _run(text, origins[0], most, end)
        if any(_run(text, origin, most, end) != tokens for origin in origins[1:]):
            return None
        survivals = SURVIVALS[best][: len(tokens)]
        count = len(survivals)
        while count and survivals[count - 1] < floor:
            count -= 1
        return tuple(tokens[:count]), survivals[:count]

    return Walk((0, origins), children, line)


def _run(text: Sequence[int], origin: int, most: int, end: int | None) -> list[int]:
    """What is said from text[origin] on, at most `most` tokens."""
    tokens = list(text[origin : origin + most])
    if end is not None:
        return tokens[: tokens.index(end)] if end in tokens else tokens
    return tokens if len(tokens) == most else (tokens * (most // len(tokens) + 1))[:most]


def _by_votes(item: tuple[int, list[int]]) -> int:
    return len(item[1])


def certainty(match: int) -> float:
    """How likely a text that agreed for `match` tokens agrees once more: 0.40 after 2, 0.81 after 8, 0.98 after 32.

    Near what the embedded model's texts show; whoever acts on it corrects it by what comes true.
    """
    return 1.0 - 1.0 / (1.2 + 0.15 * match + 0.045 * match * match)


CERTAINTY = tuple(certainty(match) for match in range(MAX_MATCH + MAX_TREE_NODES + 1))
SURVIVALS = tuple(tuple(accumulate(CERTAINTY[match : match + MAX_TREE_NODES], mul)) for match in range(MAX_MATCH + 1))
"""After a match of some length: that the next token agrees, the next two, ..."""

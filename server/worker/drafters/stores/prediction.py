"""`prediction`: the text that the client expects, followed along and found again after every departure from it.

The request's field `prediction.content` (OpenAI "predicted outputs"). While the output agrees, the place in the
prediction moves along; after a departure it is taken up again where the output's latest tokens stand in it, nearest to
where it was left.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Child, Walk
from server.worker.drafters.stores.ngram_index import MAX_MATCH, NgramIndex
from server.worker.sequences import SequenceState

FIRST_MATCH = 8
"""A prediction counts as agreed for so many tokens before the first output token: it was sent on purpose."""
MAX_MISSED = 4
"""After so many tokens without agreement nothing is offered until the text is found again."""
BYTES_PER_TOKEN = 40


def has_prediction(state: SequenceState) -> bool:
    return bool(state.request.speculation.prediction)


class _Reader:
    """One sequence's place in its prediction.

    at      where the next token is expected; num_seen tokens of the sequence have been followed
    match   tokens in agreement before `at`; 0 = departed, for `missed` tokens
    """

    def __init__(self, text: Sequence[int], num_prompt: int) -> None:
        self.text = list(text)
        self.index = NgramIndex()
        self.at = 0
        self.match = FIRST_MATCH
        self.missed = 0
        self.num_seen = num_prompt

    def learn(self, tokens: Sequence[int], most: int) -> int:
        taken = self.index.learn(self.text, len(self.text) - 1, most)
        end = min(len(tokens), self.num_seen + max(0, most - taken))
        for position in range(self.num_seen, end):
            self._follow(tokens, position)
        followed, self.num_seen = end - self.num_seen, max(self.num_seen, end)
        return taken + max(0, followed)

    def _follow(self, tokens: Sequence[int], position: int) -> None:
        if self.at < len(self.text) and self.text[self.at] == tokens[position]:
            self.at, self.match, self.missed = self.at + 1, min(MAX_MATCH, self.match + 1), 0
            return
        spots = self.index.find(self.text, list(tokens[max(0, position + 1 - MAX_MATCH) : position + 1]))
        if spots:
            longest = spots[0].match
            nearest = min((spot for spot in spots if spot.match == longest), key=lambda spot: abs(spot.at - self.at))
            self.at, self.match, self.missed = nearest.at, longest, 0
        else:
            # One changed token is the likeliest departure: expect the one after it.
            self.at, self.match, self.missed = self.at + 1, 0, self.missed + 1


class PredictionStore:
    name = "prediction"
    needs_top = 0

    def __init__(self) -> None:
        self._readers: dict[int, _Reader] = {}

    def learn(self, want: Want, most: int) -> int:
        text = want.state.request.speculation.prediction
        if not text:
            return 0
        reader = self._readers.get(want.seq_id)
        if reader is None:
            reader = self._readers[want.seq_id] = _Reader(text, want.state.num_prompt)
        return reader.learn(want.tokens, most)

    def begin(self, want: Want) -> Walk | None:
        reader = self._readers.get(want.seq_id)
        if reader is None or reader.missed > MAX_MISSED or reader.num_seen < len(want.tokens):
            return None
        text = reader.text

        def children(place: tuple[int, float]) -> list[Child]:
            at, odds = place
            return [(1.0 - 1.0 / odds, text[at], (at + 1, odds + 1.0))] if at < len(text) else []

        # One miss in `odds` tokens is expected: few after a long agreement, most right after departures.
        odds = 2.0 + reader.match if reader.match else 1.0 + 1.0 / (1 + reader.missed)
        return Walk((reader.at, odds), children)

    def release(self, seq_id: int, state: SequenceState) -> None:
        self._readers.pop(seq_id, None)

    @property
    def num_bytes(self) -> int:
        return sum(r.index.num_bytes + BYTES_PER_TOKEN * len(r.text) for r in self._readers.values())

"""`suffix`: what followed these tokens before, in the sequence itself and in the tenant's finished outputs.

Source: Oliaro et al., "SuffixDecoding" (2024). Departures: instead of a counted suffix tree there is the index of
`history` over all outputs in a row, at a tenth of a tree's cost for each token learnt: the longest match is continued,
the sequence's own before a shared one, and the latest few occurrences vote; long drafts from short matches are held
back by `certainty`, not by a length rule; prompts are not shared, but for their last tokens, which tell how answers
begin.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from scheduler.types import SpeculationMode
from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Walk
from server.worker.drafters.stores.history import HistoryStore, continuations
from server.worker.drafters.stores.ngram_index import BYTES_PER_TOKEN, MAX_MATCH, NgramIndex, Spot
from server.worker.drafters.stores.shared import Arrays, pack_texts, tenant_key, unpack_texts
from server.worker.sequences import SequenceState

ENOUGH = 16
"""A match of this length in the sequence's own text is not bettered elsewhere."""
END = -1
"""Stands behind each output; no token equals it."""
PROMPT_TAIL = 16
WORK = 96
"""Tokens of finished outputs learnt in one step that asks, some 40 us: more than a step of many sequences writes."""
MAX_WAITING = 256
"""Finished outputs that wait to be learnt; beyond it the oldest is forgotten."""
MAX_REMEMBERED = 4096
"""Requests whose learnt length is remembered, so that a preempted one is not learnt twice."""
TEXT_BYTES = 4
"""Of a token in a text."""


class _Text(NamedTuple):
    tenant: bytes
    tokens: array[int]


class _Outputs:
    """Finished outputs of one tenant, one behind the other, each with END behind it."""

    __slots__ = ("index", "text")

    def __init__(self) -> None:
        self.text, self.index = array("i"), NgramIndex()

    def find(self, tail: array[int]) -> list[Spot]:
        """Where the tail stands with a token behind it, the longest match first."""
        return [spot for spot in self.index.find(self.text, tail) if self.text[spot.at] != END]


class SuffixStore:
    name = "suffix"
    needs_top = 0

    def __init__(self, history: HistoryStore, max_bytes: int) -> None:
        """max_bytes: of the finished outputs. They are held in two generations of half of it each: when the young one
        is full, the old one is forgotten."""
        self._history = history
        self._most_young = max(1, max_bytes // (BYTES_PER_TOKEN + TEXT_BYTES) // 2)
        self._young: dict[bytes, _Outputs] = {}
        self._old: dict[bytes, _Outputs] = {}
        self._num_young = self._num_old = 0
        self._newest: _Outputs | None = None
        self._waiting: deque[_Text] = deque(maxlen=MAX_WAITING)
        self._num_learnt: OrderedDict[str, int] = OrderedDict()

    def learn(self, want: Want, most: int) -> int:
        return self._history.learn(want, most)

    def tend(self) -> None:
        """Learn a piece of what waits."""
        self.work(WORK)

    def begin(self, want: Want) -> Walk | None:
        spots = self._history.find(want)
        text: Sequence[int] = want.tokens
        match = spots[0].match if spots else 0
        is_shared = False
        if match < ENOUGH and self._young:
            tenant = tenant_key(want.state.request.cache_salt)
            tail = array("i", want.tokens[-MAX_MATCH:])
            for generation in (self._young, self._old):
                outputs = generation.get(tenant)
                found = outputs.find(tail) if outputs is not None else []
                if outputs is not None and found and found[0].match > match:
                    text, spots, match, is_shared = outputs.text, found, found[0].match, True
        return continuations(text, spots, END if is_shared else None) if spots else None

    def release(self, seq_id: int, state: SequenceState) -> None:
        """Put the output aside to be learnt while later sequences are asked about. Requests that opted out are not."""
        self._history.release(seq_id, state)
        request, length = state.request, len(state.history)
        learnt = self._num_learnt.get(request.id, state.num_prompt)
        if request.speculation.mode is SpeculationMode.OFF or length <= learnt:
            return
        self._num_learnt[request.id] = length
        if len(self._num_learnt) > MAX_REMEMBERED:
            self._num_learnt.popitem(last=False)
        first = max(0, learnt - PROMPT_TAIL)
        self._waiting.append(_Text(tenant_key(request.cache_salt), array("i", state.history[first:])))

    def work(self, most: int) -> int:
        """Index waiting outputs, at most so many tokens; returns how many were."""
        done = 0
        while done < most:
            newest = self._newest
            if newest is not None and newest.index.num_indexed < len(newest.text):
                done += newest.index.learn(newest.text, len(newest.text), most - done)
            elif not self._next_text():
                break
        return done

    def _next_text(self) -> bool:
        """Begin with the next waiting output; False if none waits."""
        if not self._waiting:
            return False
        tenant, tokens = self._waiting.popleft()
        if self._num_young + len(tokens) >= self._most_young:
            self._old, self._num_old = self._young, self._num_young
            self._young, self._num_young = {}, 0
        self._newest = self._young.setdefault(tenant, _Outputs())
        self._newest.text.extend(tokens)
        self._newest.text.append(END)
        self._num_young += len(tokens) + 1
        return True

    def save(self) -> Arrays:
        """The finished outputs, oldest first; they are indexed again when loaded."""
        texts = [
            (tenant, tokens)
            for generation in (self._old, self._young)
            for tenant, outputs in generation.items()
            for tokens in _split(outputs.text)
        ]
        return pack_texts([*texts, *((text.tenant, text.tokens) for text in self._waiting)])

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take in what `save` gave. Raises ValueError or KeyError if it is something else."""
        for tenant, tokens in unpack_texts(arrays):
            self._waiting.append(_Text(tenant, array("i", tokens)))
            while self.work(1 << 10):
                pass

    def check(self) -> None:
        """Raise AssertionError if the counts are wrong or the bound broken. For tests."""
        for generation, count in ((self._young, self._num_young), (self._old, self._num_old)):
            assert count == sum(len(outputs.text) for outputs in generation.values())
            assert count <= self._most_young or sum(1 for one in generation.values() for _ in _split(one.text)) == 1
            for outputs in generation.values():
                assert outputs.text[-1] == END
                assert outputs is self._newest or outputs.index.num_indexed == len(outputs.text)

    @property
    def num_shared_bytes(self) -> int:
        return (BYTES_PER_TOKEN + TEXT_BYTES) * (self._num_young + self._num_old)

    @property
    def num_bytes(self) -> int:
        """With the sequences' own indexes, which `history` counts too where both are loaded."""
        waiting = TEXT_BYTES * sum(len(text.tokens) for text in self._waiting)
        return self.num_shared_bytes + waiting + self._history.num_bytes


def _split(text: array[int]) -> list[array[int]]:
    """The outputs of a text."""
    outputs, start = [], 0
    for at, token in enumerate(text):
        if token == END:
            outputs.append(text[start:at])
            start = at + 1
    return outputs

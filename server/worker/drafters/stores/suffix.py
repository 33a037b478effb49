"""`suffix` (SuffixDecoding): what followed these tokens, in the sequence itself and in all finished outputs.

Source: Oliaro et al., "SuffixDecoding" (2024): counts give the probabilities.
Departures: a sequence's own text is searched by the index of `history` (no second structure for it); the longest match
is continued, the sequence's own before a shared one, instead of scoring a draft for every length: one expansion, not
ten; long drafts from short matches are held back by `certainty`, not by a length rule; prompts are not shared, but for
their last tokens, which tell how answers begin.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from scheduler.types import SpeculationMode
from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Child, Line, Walk
from server.worker.drafters.stores.history import CERTAINTY, HistoryStore, continuations
from server.worker.drafters.stores.shared import Arrays, pack_texts, tenant_key, unpack_texts
from server.worker.drafters.stores.suffix_tree import NODE_BYTES, ROOT, SuffixTree
from server.worker.sequences import SequenceState

TAILS = (2, 4, 8, 16)
"""Lengths of the tails that are looked for. A tail stands in a tree only if all shorter ones do."""
PROMPT_TAIL = 16
WORK = 16
"""Nodes visited on behalf of finished outputs in each step that asks, some 15 us, whoever many are asked about: a busy
engine writes faster than it can afford to learn."""
WORTH_RATE, LEAST_WORTH = 0.02, 0.1
MAX_WAITING = 256
"""Finished outputs that wait to be learnt; beyond it the oldest is forgotten."""
_NUMBERS = (1 << 31) - 1
MAX_REMEMBERED = 4096
"""Requests whose learnt length is remembered, so that a preempted one is not learnt twice."""
TEXT_BYTES = 4
"""Of a token in a text."""


class _Text(NamedTuple):
    tenant: bytes
    tokens: array[int]


class _Guess(NamedTuple):
    """What the finished outputs say that a sequence has at index `at`."""

    at: int
    token: int


class SuffixStore:
    name = "suffix"
    needs_top = 0

    def __init__(self, history: HistoryStore, max_bytes: int) -> None:
        """max_bytes: of the finished outputs; the oldest are forgotten first."""
        self._history, self._max_bytes = history, max_bytes
        self._trees: dict[bytes, SuffixTree] = {}
        self._texts: deque[_Text] = deque()
        self._num_tokens = 0
        self._waiting: deque[_Text] = deque(maxlen=MAX_WAITING)
        self._num_inserted = 0
        """Suffixes of the newest text that are in its tree; _num_removed: of the oldest, out of its tree."""
        self._num_removed = 0
        self._num_nodes = 0
        self._number = 0
        """Of the oldest text."""
        self._num_learnt: OrderedDict[str, int] = OrderedDict()
        self._guesses: dict[int, _Guess] = {}
        self._worth, self._num_calls = 0.5, 0
        """Recent share of askings in which a finished output, and nothing else, told the next token."""

    def learn(self, want: Want, most: int) -> int:
        guess = self._guesses.pop(want.seq_id, None)
        is_right = guess is not None and want.tokens[guess.at : guess.at + 1] == [guess.token]
        self._worth += WORTH_RATE * (is_right - self._worth)
        return self._history.learn(want, most)

    def tend(self) -> None:
        """Learn a piece of what waits; an eighth as often where what was learnt is of little use."""
        self._num_calls += 1
        if self._worth >= LEAST_WORTH or self._num_calls % 8 == 0:
            self.work(WORK)

    def begin(self, want: Want) -> Walk | None:
        spots = self._history.find(want)
        match = spots[0].match if spots else 0
        tree = self._trees.get(tenant_key(want.state.request.cache_salt))
        if tree is not None and match < TAILS[-1]:
            found = longest(tree, want.tokens)
            if found is not None and found[2] > match:
                walk = shared_continuations(tree, found)
                self._guesses[want.seq_id] = _Guess(len(want.tokens), walk.children(found)[0][1])
                return walk
        return continuations(want.tokens, spots) if spots else None

    def release(self, seq_id: int, state: SequenceState) -> None:
        """Put the output aside to be learnt while later sequences are asked about. Requests that opted out are not."""
        self._history.release(seq_id, state)
        self._guesses.pop(seq_id, None)
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
        """Insert suffixes of waiting outputs and remove as many as memory demands, until `most` nodes were visited.

        Returns how many were; the last suffix may go a little beyond.
        """
        done = 0
        while done < most:
            if self.num_shared_bytes > self._max_bytes and len(self._texts) > 1:
                done += self._remove_one()
            elif self._newest_is_in() and not self._next_text():
                break
            else:
                done += self._insert_one()
        return done

    def _newest_is_in(self) -> bool:
        return not self._texts or self._num_inserted == len(self._texts[-1].tokens)

    def _next_text(self) -> bool:
        """Begin with the next waiting output; False if none waits."""
        if not self._waiting:
            return False
        text = self._waiting.popleft()
        tree = self._trees.get(text.tenant)
        if tree is None:
            tree = self._trees[text.tenant] = SuffixTree()
        # Numbers go up and round within 31 bits; texts between the oldest and the newest have numbers between theirs.
        tree.texts[(self._number + len(self._texts)) & _NUMBERS] = text.tokens
        self._texts.append(text)
        self._num_tokens += len(text.tokens)
        self._num_inserted = 0
        return True

    def _insert_one(self) -> int:
        tree = self._trees[self._texts[-1].tenant]
        before = tree.num_nodes
        num_visited = tree.insert((self._number + len(self._texts) - 1) & _NUMBERS, self._num_inserted)
        self._num_nodes += tree.num_nodes - before
        self._num_inserted += 1
        return num_visited

    def _remove_one(self) -> int:
        """The oldest text goes, suffix by suffix; never the newest, which may be half inserted."""
        text = self._texts[0]
        tree = self._trees[text.tenant]
        before = tree.num_nodes
        num_visited = tree.remove(self._number, self._num_removed)
        self._num_nodes += tree.num_nodes - before
        self._num_removed += 1
        if self._num_removed == len(text.tokens):
            self._texts.popleft()
            del tree.texts[self._number]
            self._number = (self._number + 1) & _NUMBERS
            self._num_tokens -= len(text.tokens)
            self._num_removed = 0
            if not tree.texts:
                del self._trees[text.tenant]
        return num_visited

    def save(self) -> Arrays:
        """The finished outputs; trees are grown again from them."""
        texts = [*self._texts, *self._waiting]
        return pack_texts([(text.tenant, text.tokens) for text in texts])

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take in what `save` gave. Raises ValueError or KeyError if it is something else."""
        for tenant, tokens in unpack_texts(arrays):
            self._waiting.append(_Text(tenant, array("i", tokens)))
            while self.work(1 << 10):
                pass

    def check(self) -> None:
        """Raise AssertionError if trees and texts contradict each other. For tests."""
        for tree in self._trees.values():
            tree.check()
        assert self._num_nodes == sum(tree.num_nodes for tree in self._trees.values())
        counted = sum(tree.counts[ROOT] for tree in self._trees.values())
        missing = len(self._texts[-1].tokens) - self._num_inserted if self._texts else 0
        assert counted == self._num_tokens - missing - self._num_removed

    @property
    def num_shared_bytes(self) -> int:
        return NODE_BYTES * self._num_nodes + TEXT_BYTES * self._num_tokens

    @property
    def num_bytes(self) -> int:
        """With the sequences' own indexes, which `history` counts too where both are loaded."""
        waiting = TEXT_BYTES * sum(len(text.tokens) for text in self._waiting)
        return self.num_shared_bytes + waiting + self._history.num_bytes


def longest(tree: SuffixTree, tokens: Sequence[int]) -> tuple[int, int, int] | None:
    """(node, used tokens of its label, length) of the longest tail that something follows in the tree."""
    best = None
    tail = array("i", tokens[-TAILS[-1] :])
    for length in TAILS:
        found = tree.find(tail[-length:]) if length <= len(tail) else None
        if found is None or tree.is_end(*found):
            break
        best = (*found, length)
    return best


def shared_continuations(tree: SuffixTree, place: tuple[int, int, int]) -> Walk:
    """Walk on from a place in a tree, the most frequent continuations first."""
    counts, lengths = tree.counts, tree.lengths

    def children(place: tuple[int, int, int]) -> list[Child]:
        node, used, match = place
        sure = CERTAINTY[match]
        if used < lengths[node]:
            return [(sure, tree.token(node, used), (node, used + 1, match + 1))]
        below = sorted(tree.children(node), key=counts.__getitem__, reverse=True)
        sure /= counts[node]
        return [(sure * counts[child], tree.token(child), (child, 1, match + 1)) for child in below]

    def line(most: int, floor: float) -> Line:
        node, used, match = place
        tokens: list[int] = []
        survivals: list[float] = []
        survival = 1.0
        while len(tokens) < most:
            sure = CERTAINTY[match]
            if used == lengths[node]:
                below = max(tree.children(node), key=counts.__getitem__, default=None)
                if below is None:
                    break
                sure = sure / counts[node] * counts[below]
                node, used = below, 0
            survival *= sure
            if survival < floor:
                break
            tokens.append(tree.token(node, used))
            survivals.append(survival)
            used, match = used + 1, match + 1
        return tuple(tokens), tuple(survivals)

    return Walk(place, children, line)

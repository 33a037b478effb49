"""`SyntheticDrafter`: drafts that are right as often as told, for capacity tests of any model, random weights included.

It knows the target's own continuation because it has seen the same request before: what a released sequence held is
kept, and when the same prompt comes again with the same noise its drafts are replayed, a share of them spoilt. They are
verified like any others, so the text is the model's own and only the speed is made up. Never a default
(`--synthetic-acceptance`; speculative reference, section 3.8).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from scheduler.types import Drafts, Request
from server.worker.drafters.base import Want
from server.worker.sequences import SequenceState

BYTES_PER_TOKEN = 8


@dataclass(slots=True)
class _Continuation:
    """What followed a prompt, and what is drafted in its place."""

    tokens: NDArray[np.int32]
    drafts: NDArray[np.int32]


@dataclass(slots=True)
class _Replay:
    """A running sequence: what it may repeat, None if it is new, and how much of its output was as known."""

    known: _Continuation | None
    num_agreed: int = 0


class SyntheticDrafter:
    """Replays known continuations.

    acceptance  share of drafts that are right, in (0, 1]; each is spoilt independently, fixed by request and position
    max_bytes   of what is remembered; the oldest goes first
    """

    name = "synthetic"
    is_sequential = False
    needs_top = 0

    def __init__(self, acceptance: float, vocab_size: int, max_bytes: int) -> None:
        if not 0 < acceptance <= 1:
            raise ValueError(f"the synthetic acceptance is {acceptance}, but must be above 0 and at most 1")
        self._acceptance, self._vocab_size, self._max_bytes = acceptance, vocab_size, max_bytes
        self._known: OrderedDict[bytes, _Continuation] = OrderedDict()
        self._replays: dict[int, _Replay] = {}
        self.num_bytes = 0

    def serves(self, state: SequenceState) -> bool:
        return True

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        """See `Drafter.propose`: nothing for a request that is new, or that goes another way than the last time."""
        return [self._offer(want) for want in wants]

    def release(self, seq_id: int, state: SequenceState) -> None:
        """Remember how the sequence went on, unless more of it is known."""
        self._replays.pop(seq_id, None)
        tokens = np.asarray(state.history[state.num_prompt :], dtype=np.int32)
        key = key_of(state.request)
        known = self._known.get(key)
        if not tokens.size or (known is not None and np.array_equal(known.tokens[: tokens.size], tokens)):
            return
        self._forget(key)
        noise = random.Random(key)
        is_right = np.fromiter((noise.random() < self._acceptance for _ in range(tokens.size)), bool, tokens.size)
        drafts = np.where(is_right, tokens, (tokens + 1) % self._vocab_size).astype(np.int32)
        self._known[key] = _Continuation(tokens, drafts)
        self.num_bytes += BYTES_PER_TOKEN * tokens.size
        while self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._known)))

    def _offer(self, want: Want) -> Drafts | None:
        replay = self._replays.get(want.seq_id)
        if replay is None:
            replay = self._replays[want.seq_id] = _Replay(self._known.get(key_of(want.state.request)))
        start = want.num_output
        if replay.known is None or start >= replay.known.tokens.size or not _agrees(want, replay, replay.known.tokens):
            return None
        tokens = replay.known.drafts[start : start + want.num_drafts].tolist()
        return Drafts(tuple(tokens), tuple(self._acceptance ** (i + 1) for i in range(len(tokens))), self.name)

    def _forget(self, key: bytes) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self.num_bytes -= BYTES_PER_TOKEN * known.tokens.size


def _agrees(want: Want, replay: _Replay, known: NDArray[np.int32]) -> bool:
    """Is the output so far the one that is known? Each token is compared once."""
    num_prompt = want.state.num_prompt
    while (
        replay.num_agreed < want.num_output and want.tokens[num_prompt + replay.num_agreed] == known[replay.num_agreed]
    ):
        replay.num_agreed += 1
    return replay.num_agreed == want.num_output


def key_of(request: Request) -> bytes:
    """Requests with the same key have the same text: prompt, salt, and the noise where there is any."""
    sampling = request.sampling
    noise = (sampling.seed, sampling.sample_index) if sampling.temperature > 0 else None
    digest = blake2b(repr((request.cache_salt, sampling.temperature, noise)).encode(), digest_size=16)
    digest.update(np.asarray(request.prompt, dtype=np.int32).tobytes())
    return digest.digest()

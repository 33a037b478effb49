"""`ngram_prob` (STAND): the target's own probabilities behind the last tokens, averaged over the times it stood there.

Source: Song et al., "Accelerated Test-Time Scaling with Model-Free Speculative Sampling" (2025). Its stochastic
drafting comes with the coupling: candidates are ranked by log q plus the very noise that the target's sample will be
drawn with (speculative reference 2.2), so that a draft is right far more often than its probability. Departures: a tree
grown best first instead of one fitted to data; without coupling the ranking is by q alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.philox import uniform
from scheduler.types import VerifyMode
from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Child, Walk
from server.worker.drafters.stores.shared import Arrays, Row, TenantTables, pack_tables, tenant_key, unpack_tables
from server.worker.sequences import SequenceState

NUM_CANDIDATES = 10
ORDERS = (4, 3, 2)
"""Lengths of the contexts, longest first."""
ENTRY_BYTES = 800
"""A context with its candidates; measured with tracemalloc."""
LEAST = 0.005
"""Candidates less likely than this are not kept (the best one always is): each costs 3 us of noise when it is drawn."""
MAX_ROWS = 8
"""An average forgets what is older than so many observations, about."""
WEAK = 0.5
"""Trust in a context that was seen once; one that was seen n times has an n-th of the distrust."""


class Guess(NamedTuple):
    """The averaged probabilities of one context, best first, and over how many rows (at most MAX_ROWS)."""

    num_rows: int
    ids: tuple[int, ...]
    probabilities: tuple[float, ...]


class NgramProbStore:
    name = "ngram_prob"
    needs_top = NUM_CANDIDATES

    def __init__(self, max_bytes: int) -> None:
        self.tables: TenantTables[Guess] = TenantTables(max_bytes, ENTRY_BYTES)
        self._num_seen: dict[int, int] = {}

    def learn(self, want: Want, most: int) -> int:
        """Takes all rows, whatever `most` says: they come with the step that judged them and never again."""
        if want.tops is None:
            return 0
        table, taken = self.tables.writing(tenant_key(want.state.request.cache_salt)), 0
        known, before = self._num_seen.get(want.seq_id, 0), len(table)
        ids = want.tops.ids[:, :NUM_CANDIDATES].tolist()
        probabilities = np.exp(want.tops.logprobs[:, :NUM_CANDIDATES]).tolist()
        for row, end in enumerate(want.tops.ends):
            if end > known:
                for order in ORDERS:
                    if order <= end:
                        key = hash(tuple(want.tokens[end - order : end]))
                        table[key] = averaged(table.get(key), ids[row], probabilities[row])
                taken += 1
        self._num_seen[want.seq_id] = max(known, *want.tops.ends)
        self.tables.written(len(table) - before)
        return taken

    def begin(self, want: Want) -> Walk | None:
        table = self.tables.get(want.state.request.cache_salt)
        if table is None:
            return None
        request, first = want.state.request, want.num_output
        seed, sample_index = request.sampling.seed, request.sampling.sample_index
        is_coupled = not want.state.recipe.is_greedy and request.speculation.verify is VerifyMode.COUPLED

        def children(place: tuple[int, tuple[int, ...]]) -> list[Child]:
            depth, tail = place
            guess = find(table, tail)
            if guess is None:
                return []
            shares = guess.probabilities
            if is_coupled:
                uniforms = [uniform(seed, sample_index, first + depth, 0, token) for token in guess.ids]
                shares = coupled_shares(shares, uniforms)
            trust = 1.0 - (1.0 - WEAK) / guess.num_rows
            ranked = sorted(zip(shares, guess.ids, strict=True), reverse=True)
            return [(trust * share, token, (depth + 1, (*tail[-3:], token))) for share, token in ranked]

        return Walk((0, tuple(want.tokens[-ORDERS[0] :])), children)

    def release(self, seq_id: int, state: SequenceState) -> None:
        self._num_seen.pop(seq_id, None)

    def save(self) -> Arrays:
        return pack_tables(
            self.tables,
            3,
            1,
            lambda key, guess: [
                Row((key, guess.num_rows, token), (probability,))
                for token, probability in zip(guess.ids, guess.probabilities, strict=True)
            ],
        )

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take in what `save` gave. Raises ValueError or KeyError if it is something else."""
        found: dict[tuple[bytes, int, int], list[tuple[int, float]]] = {}
        for tenant, row in unpack_tables(arrays, 3, 1):
            (key, num_rows, token), (probability,) = row
            if not (1 <= num_rows <= MAX_ROWS and token >= 0 and 0.0 <= probability <= 1.0):
                raise ValueError("a guess that is no probability")
            found.setdefault((tenant, key, num_rows), []).append((token, probability))
        for (tenant, key, num_rows), pairs in found.items():
            guess = Guess(num_rows, tuple(token for token, _ in pairs), tuple(share for _, share in pairs))
            self.tables.put(tenant, key, guess)

    @property
    def num_bytes(self) -> int:
        return self.tables.num_bytes


def averaged(guess: Guess | None, ids: list[int], probabilities: list[float]) -> Guess:
    """The guess with one more row counted in; the most likely candidates stay."""
    num_rows = guess.num_rows if guess is not None else 0
    weight, merged = 1.0 / (num_rows + 1), dict[int, float]()
    if guess is not None:
        merged = {token: (1.0 - weight) * share for token, share in zip(guess.ids, guess.probabilities, strict=True)}
    for token, share in zip(ids, probabilities, strict=True):
        merged[token] = merged.get(token, 0.0) + weight * share
    first, *others = sorted(merged, key=merged.__getitem__, reverse=True)[:NUM_CANDIDATES]
    best = (first, *(token for token in others if merged[token] >= LEAST))
    return Guess(min(num_rows + 1, MAX_ROWS), best, tuple(merged[token] for token in best))


def find(table: Mapping[int, Guess], tail: tuple[int, ...]) -> Guess | None:
    """The guess of the longest known context."""
    for order in ORDERS:
        if order <= len(tail):
            guess = table.get(hash(tail[len(tail) - order :]))
            if guess is not None:
                return guess
    return None


def coupled_shares(probabilities: Sequence[float], uniforms: Sequence[float]) -> tuple[float, ...]:
    """How likely each candidate is the target's sample, given the uniforms behind the noise that it is drawn with.

    The sample is the argmax of log p + noise; with p near q it is the candidate with the largest log q + noise, the
    more surely the further it leads. Estimate: the softmax of these sums, times the mass that q knows.
    """
    # exp(log q + Gumbel noise), the noise being -log(-log(uniform)).
    weights = [share / -log(uniform) for share, uniform in zip(probabilities, uniforms, strict=True)]
    scale = min(1.0, sum(probabilities)) / max(sum(weights), 1e-30)
    return tuple(scale * weight for weight in weights)

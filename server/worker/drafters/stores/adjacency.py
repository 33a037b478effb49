"""`adjacency` (Token Recycling): the best tokens that the target named the last time it stood behind this token.

Source: Luo et al., "Turning Trash into Treasure: Accelerating Inference of LLMs with Token Recycling" (2024).
Departures: the tree is not a fixed template but grown best first, with how often the candidate of each rank came true
as its probabilities; these rates are measured as sequences go on, over all tenants together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Child, Walk
from server.worker.drafters.stores.shared import (
    Arrays,
    Row,
    TenantTables,
    checked,
    pack_tables,
    tenant_key,
    unpack_tables,
)
from server.worker.sequences import SequenceState

NUM_CANDIDATES = 8
ENTRY_BYTES = 400
"""A token's entry with its candidates; measured with tracemalloc."""
PRIOR_RATES = (0.40, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
PRIOR_WEIGHT = 64.0
"""Rates begin as if they had been seen so often; beyond MAX_WEIGHT old observations fade."""
MAX_WEIGHT = 4096.0


class AdjacencyStore:
    name = "adjacency"
    needs_top = NUM_CANDIDATES

    def __init__(self, max_bytes: int) -> None:
        self.tables: TenantTables[tuple[int, ...]] = TenantTables(max_bytes, ENTRY_BYTES)
        self._hits = [PRIOR_WEIGHT * rate for rate in PRIOR_RATES]
        self._weight = PRIOR_WEIGHT
        self._num_seen: dict[int, int] = {}
        """By sequence: rows whose context ends no later have been learnt."""

    def learn(self, want: Want, most: int) -> int:
        """Takes all rows, whatever `most` says: they come with the step that judged them and never again."""
        if want.tops is None:
            return 0
        table, taken = self.tables.writing(tenant_key(want.state.request.cache_salt)), 0
        known, before = self._num_seen.get(want.seq_id, 0), len(table)
        for end, ids in zip(want.tops.ends, want.tops.ids[:, :NUM_CANDIDATES].tolist(), strict=True):
            if end > known:
                token = want.tokens[end - 1]
                self._score(table.get(token, ()), want.tokens[end])
                table[token] = tuple(ids)
                taken += 1
        self._num_seen[want.seq_id] = max(known, *want.tops.ends)
        self.tables.written(len(table) - before)
        return taken

    def _score(self, candidates: tuple[int, ...], token: int) -> None:
        """Which rank would have been right."""
        if not candidates:
            return
        if self._weight >= MAX_WEIGHT:
            self._weight /= 2
            self._hits = [hits / 2 for hits in self._hits]
        self._weight += 1
        if token in candidates:
            self._hits[candidates.index(token)] += 1

    def begin(self, want: Want) -> Walk | None:
        table = self.tables.get(want.state.request.cache_salt)
        if table is None or want.tokens[-1] not in table:
            return None
        # A candidate never passes one of a better rank: the order within an entry is the target's.
        rates, least = [], 1.0
        for hits in self._hits:
            least = min(least, hits / self._weight)
            rates.append(least)

        def children(token: int) -> list[Child]:
            return [(rate, child, child) for rate, child in zip(rates, table.get(token, ()), strict=False)]

        return Walk(want.tokens[-1], children)

    def release(self, seq_id: int, state: SequenceState) -> None:
        self._num_seen.pop(seq_id, None)

    def save(self) -> Arrays:
        arrays = pack_tables(self.tables, 1 + NUM_CANDIDATES, 0, lambda token, ids: [Row((token, *_padded(ids)), ())])
        return {**arrays, "hits": np.array([self._weight, *self._hits])}

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take in what `save` gave. Raises ValueError or KeyError if it is something else."""
        weight, *hits = checked(arrays["hits"], np.float64, (1 + NUM_CANDIDATES,)).tolist()
        if not (weight > 0.0 and min(hits) >= 0.0 and sum(hits) <= weight):
            raise ValueError("hits of ranks that are no shares of their weight")
        self._weight, self._hits = weight, hits
        for tenant, row in unpack_tables(arrays, 1 + NUM_CANDIDATES, 0):
            token, *ids = row.numbers
            self.tables.put(tenant, token, tuple(child for child in ids if child >= 0))

    @property
    def num_bytes(self) -> int:
        return self.tables.num_bytes


def _padded(ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids + (-1,) * (NUM_CANDIDATES - len(ids))

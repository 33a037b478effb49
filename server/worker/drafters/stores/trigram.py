"""`trigram` (ADED): what followed these two tokens, counted over all texts of a tenant, with room for exploration.

Source: Liu et al., "Adaptive Draft-Verification for Efficient LLM Decoding" (2024): candidates are searched by PUCT,
path probability plus c * P * sqrt(N) / (1 + n). Departures: best-first expansion instead of a tree search, and N and n
are what was counted in texts, not visits of one search: little-known contexts and rare candidates are tried more.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from numpy.typing import NDArray

from server.worker.drafters.base import Want
from server.worker.drafters.expansion import Child, Walk
from server.worker.drafters.stores.shared import Arrays, Row, TenantTables, pack_tables, tenant_key, unpack_tables
from server.worker.sequences import SequenceState

MAX_CANDIDATES = 16
"""Of one context; beyond it all counts are halved and what falls to 0 makes room."""
ENTRY_BYTES = 420
"""A context with its counts; measured with tracemalloc."""
EXPLORE = 0.3
"""c of the rule above."""


class TrigramStore:
    name = "trigram"
    needs_top = 0

    def __init__(self, max_bytes: int, explore: float = EXPLORE) -> None:
        self.tables: TenantTables[dict[int, int]] = TenantTables(max_bytes, ENTRY_BYTES)
        self._explore = explore
        self._num_seen: dict[int, int] = {}

    def learn(self, want: Want, most: int) -> int:
        tokens, start = want.tokens, self._num_seen.get(want.seq_id, 2)
        end = min(len(tokens), start + most)
        if end <= start:
            return 0
        table = self.tables.writing(tenant_key(want.state.request.cache_salt))
        before = len(table)
        for first, second, third in zip(
            tokens[start - 2 : end - 2], tokens[start - 1 : end - 1], tokens[start:end], strict=True
        ):
            counts = table.get(first << 32 | second)
            if counts is None:
                table[first << 32 | second] = {third: 1}
            else:
                counts[third] = counts.get(third, 0) + 1
                if len(counts) > MAX_CANDIDATES:
                    table[first << 32 | second] = {token: count // 2 for token, count in counts.items() if count > 1}
        self._num_seen[want.seq_id] = end
        self.tables.written(len(table) - before)
        return end - start

    def begin(self, want: Want) -> Walk | None:
        table = self.tables.get(want.state.request.cache_salt)
        if table is None or len(want.tokens) < 2:
            return None

        def children(place: int) -> list[Child]:
            counts = table.get(place)
            return self._children(counts, (place & 0xFFFFFFFF) << 32) if counts else []

        return Walk(want.tokens[-2] << 32 | want.tokens[-1], children)

    def _children(self, counts: Mapping[int, int], context: int) -> list[Child]:
        total = sum(counts.values())
        # One more than was counted: what was never seen has a share too.
        bonus = self._explore * sqrt(total)
        shares = [(count / (total + 1) * (1 + bonus / (1 + count)), token) for token, count in counts.items()]
        scale = 1.0 / max(1.0, sum(share for share, _ in shares))
        shares.sort(key=_by_share, reverse=True)
        return [(scale * share, token, context | token) for share, token in shares]

    def release(self, seq_id: int, state: SequenceState) -> None:
        self._num_seen.pop(seq_id, None)

    def save(self) -> Arrays:
        return pack_tables(
            self.tables,
            3,
            0,
            lambda context, counts: [Row((context, token, count), ()) for token, count in counts.items()],
        )

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take in what `save` gave. Raises ValueError or KeyError if it is something else."""
        counts: dict[tuple[bytes, int], dict[int, int]] = {}
        for tenant, row in unpack_tables(arrays, 3, 0):
            context, token, count = row.numbers
            if token < 0 or count < 1:
                raise ValueError("a trigram that was never counted")
            counts.setdefault((tenant, context), {})[token] = count
        for (tenant, context), found in counts.items():
            self.tables.put(tenant, context, found)

    @property
    def num_bytes(self) -> int:
        return self.tables.num_bytes


def _by_share(item: tuple[float, int]) -> float:
    return item[0]

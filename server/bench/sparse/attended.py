"""The rows that ask and the keys they see, of every layer: what selections are judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from server.bench.sparse.passes import Reader
from server.bench.sparse.selection import grouped


@dataclass(frozen=True, slots=True)
class Row:
    """One row of one text: by layer its queries q_KGD and the keys k_LKD that it sees, itself the last."""

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]

    @property
    def num_keys(self) -> int:
        return self.keys[0].shape[0]


def rows_of(reader: Reader, texts: Iterable[Sequence[int]], tail: int, every: int = 1) -> Iterator[Row]:
    """The last `tail` rows of each text, or every n-th of them."""
    num_kv = reader.config.num_kv_heads
    for tokens in texts:
        queries: list[Tensor] = []
        keys: list[Tensor] = []

        def see(
            _: int, q_TQD: Tensor, k_TKD: Tensor, queries: list[Tensor] = queries, keys: list[Tensor] = keys
        ) -> None:
            queries.append(q_TQD[-tail:])
            keys.append(k_TKD)

        reader.read(tokens, see)
        for row in range(0, tail, every):
            visible = len(tokens) - tail + row + 1
            yield Row(tuple(grouped(q[row], num_kv) for q in queries), tuple(k[:visible] for k in keys))

"""What the stores that are shared between requests have in common: tenants, bounded tables, arrays for a file.

What one tenant's requests taught is never offered to another's: how fast an answer comes would tell what it holds.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
KEY_BYTES = 16
EVICT_AT_ONCE = 256
_V = TypeVar("_V")


@lru_cache(maxsize=4096)
def tenant_key(salt: str) -> bytes:
    """What stores know a `cache_salt` by; the salt itself, which may be a secret, stays out of files."""
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES).digest()


class TenantTables(Generic[_V]):
    """A table of integer keys per tenant, bounded together: what is oldest of the least recent tenant goes first."""

    def __init__(self, max_bytes: int, entry_bytes: int) -> None:
        self._max_entries = max(1, max_bytes // entry_bytes)
        self._entry_bytes = entry_bytes
        self._tables: OrderedDict[bytes, dict[int, _V]] = OrderedDict()
        self._num_entries = 0

    def get(self, salt: str) -> dict[int, _V] | None:
        """A tenant's table for looking things up; writing to it needs `writing`."""
        return self._tables.get(tenant_key(salt))

    def writing(self, tenant: bytes) -> dict[int, _V]:
        """A tenant's table to be written to; `written` must follow. It is now the most recent."""
        table = self._tables.get(tenant)
        if table is None:
            table = self._tables[tenant] = {}
        self._tables.move_to_end(tenant)
        return table

    def put(self, tenant: bytes, key: int, value: _V) -> None:
        """Write one entry."""
        table = self.writing(tenant)
        before = len(table)
        table[key] = value
        self.written(len(table) - before)

    def written(self, num_new: int) -> None:
        """Count new entries of the most recent table, and make room if there are too many."""
        self._num_entries += num_new
        newest = next(reversed(self._tables))
        if not self._tables[newest]:
            del self._tables[newest]
        while self._num_entries > self._max_entries:
            tenant, table = next(iter(self._tables.items()))
            gone = list(islice(table, min(EVICT_AT_ONCE, max(1, len(table) // 2))))
            for key in gone:
                del table[key]
            self._num_entries -= len(gone)
            if not table:
                del self._tables[tenant]

    def items(self) -> Iterator[tuple[bytes, dict[int, _V]]]:
        """Tables by tenant, least recent first."""
        return iter(self._tables.items())

    def check(self) -> None:
        """Raise AssertionError if the count is wrong or the bound broken. For tests."""
        assert self._num_entries == sum(map(len, self._tables.values())) <= self._max_entries
        assert all(self._tables.values()), "an empty table is kept"

    @property
    def num_bytes(self) -> int:
        return self._num_entries * self._entry_bytes


def pack_texts(texts: Sequence[tuple[bytes, Sequence[int]]]) -> Arrays:
    """Token strings of tenants as arrays; `unpack_texts` gives them back."""
    tenants = list(dict.fromkeys(tenant for tenant, _ in texts))
    places = {tenant: place for place, tenant in enumerate(tenants)}
    return {
        "tenants": np.frombuffer(b"".join(tenants), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "owners": np.array([places[tenant] for tenant, _ in texts], dtype=np.int32),
        "lengths": np.array([len(tokens) for _, tokens in texts], dtype=np.int64),
        "tokens": np.array([token for _, tokens in texts for token in tokens], dtype=np.int32),
    }


def unpack_texts(arrays: Mapping[str, NDArray[Any]]) -> list[tuple[bytes, list[int]]]:
    """Raises ValueError or KeyError if the arrays are not what `pack_texts` made."""
    tenants, owners = _owners(arrays)
    lengths = checked(arrays["lengths"], np.int64, (len(owners),)).tolist()
    tokens = checked(arrays["tokens"], np.int32, (-1,)).tolist()
    if sum(lengths) != len(tokens) or min(lengths, default=1) < 1 or min(tokens, default=0) < 0:
        raise ValueError("texts and their lengths do not fit")
    remaining = iter(tokens)
    return [(tenants[owner], list(islice(remaining, length))) for owner, length in zip(owners, lengths, strict=True)]


def checked(array: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array if it has this dtype and shape (-1 = any length); raises ValueError if not."""
    if array.dtype != dtype or array.ndim != len(shape):
        raise ValueError(f"an array of {array.dtype}{array.shape}, expected {np.dtype(dtype)}{shape}")
    if any(want not in (-1, have) for want, have in zip(shape, array.shape, strict=True)):
        raise ValueError(f"an array of shape {array.shape}, expected {shape}")
    return array


class Row(NamedTuple):
    """A row of packed tables: an entry has one or more."""

    numbers: tuple[int, ...]
    shares: tuple[float, ...]


def pack_tables(
    tables: TenantTables[_V], num_numbers: int, num_shares: int, rows_of: Callable[[int, _V], Sequence[Row]]
) -> Arrays:
    """Tables as arrays of rows, with so many numbers and shares in each; `unpack_tables` gives the rows back."""
    tenants: list[bytes] = []
    owners: list[int] = []
    rows: list[Row] = []
    for place, (tenant, table) in enumerate(tables.items()):
        tenants.append(tenant)
        for key, value in table.items():
            rows += rows_of(key, value)
        owners += [place] * (len(rows) - len(owners))
    return {
        "tenants": np.frombuffer(b"".join(tenants), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "owners": np.array(owners, dtype=np.int32),
        "numbers": np.array([row.numbers for row in rows], dtype=np.int64).reshape(len(rows), num_numbers),
        "shares": np.array([row.shares for row in rows], dtype=np.float64).reshape(len(rows), num_shares),
    }


def unpack_tables(arrays: Mapping[str, NDArray[Any]], num_numbers: int, num_shares: int) -> list[tuple[bytes, Row]]:
    """(tenant, row) of packed tables; raises ValueError or KeyError if the arrays are something else."""
    tenants, owners = _owners(arrays)
    numbers = checked(arrays["numbers"], np.int64, (len(owners), num_numbers)).tolist()
    shares = checked(arrays["shares"], np.float64, (len(owners), num_shares)).tolist()
    return [
        (tenants[owner], Row(tuple(row), tuple(share)))
        for owner, row, share in zip(owners, numbers, shares, strict=True)
    ]


def _owners(arrays: Mapping[str, NDArray[Any]]) -> tuple[list[bytes], list[int]]:
    """Tenants, and for every text or row the place of its tenant among them."""
    tenants = [bytes(row) for row in checked(arrays["tenants"], np.uint8, (-1, KEY_BYTES))]
    owners: list[int] = checked(arrays["owners"], np.int32, (-1,)).tolist()
    if owners and not 0 <= min(owners) <= max(owners) < len(tenants):
        raise ValueError("something that belongs to no tenant")
    return tenants, owners

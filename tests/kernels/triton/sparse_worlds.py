"""Sequences over shuffled pages for the selection kernels: keys where they were written, poison everywhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

GUARD = 64


@dataclass
class Pool:
    """`lengths` keys of each sequence; the table's tails are -7, slots nobody wrote are NaN.

    integers  values are small integers: products are exact in any order, so kernels and definitions tie alike
    """

    lengths: list[int]
    num_kv: int = 2
    group: int = 3
    head_dim: int = 40
    page: int = 16
    dtype: torch.dtype = torch.float32
    integers: bool = False
    seed: int = 0
    table: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    q: Tensor = field(init=False)
    keys: list[Tensor] = field(init=False)
    slots: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        counts = [-(-length // self.page) for length in self.lengths]
        order = torch.randperm(sum(counts) + 1, generator=generator).int()
        self.table = torch.full((len(counts), max(counts) + 1), -7, dtype=torch.int32)
        shape = (sum(counts) + 1, self.num_kv, self.page, self.head_dim)
        self.k, self.v = (torch.full(shape, math.nan, dtype=self.dtype) for _ in range(2))
        self.keys, slots, used = [], [], 0
        for index, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            self.table[index, :count] = order[used : used + count]
            used += count
            at = torch.arange(length)
            pages, offsets = self.table[index, at // self.page].long(), at % self.page
            keys, values = (self._values(length, self.num_kv, self.head_dim, generator=generator) for _ in range(2))
            self.k[pages, :, offsets], self.v[pages, :, offsets] = keys, values
            self.keys.append(keys)
            slots.append(pages * self.page + offsets)
        self.slots = torch.cat(slots)
        self.q = self._values(len(counts), self.num_kv * self.group, self.head_dim, generator=generator)

    def _values(self, *shape: int, generator: torch.Generator) -> Tensor:
        if self.integers:
            return torch.randint(-2, 3, shape, generator=generator).to(self.dtype)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    @property
    def visible(self) -> Tensor:
        return torch.tensor(self.lengths).int()

    @property
    def row_seq(self) -> Tensor:
        return torch.arange(len(self.lengths)).int()

    def products(self, row: int) -> Tensor:
        """q.k of every head, float64 [K, G, keys]."""
        q = self.q[row].double().view(self.num_kv, self.group, self.head_dim)
        return torch.einsum("kgd,nkd->kgn", q, self.keys[row].double())


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a tensor full of NaN or -7, the memory it lies in), which `unharmed` looks at afterwards."""
    count = math.prod(shape)
    whole = torch.full((count + 2 * GUARD,), math.nan if dtype.is_floating_point else -7, dtype=dtype)
    whole[:GUARD] = whole[-GUARD:] = 42
    return whole[GUARD : GUARD + count].view(shape), whole


def unharmed(whole: Tensor) -> bool:
    return bool((whole[:GUARD] == 42).all() and (whole[-GUARD:] == 42).all())

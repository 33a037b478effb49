"""Small paged worlds for the kernel tests: sequences with committed keys, pages full of NaN elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import AttentionRows, Ops


@dataclass(frozen=True)
class Shape:
    num_q: int = 4
    num_kv: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32


def rows_of(spans: list[tuple[int, int]], pages: list[list[int]], page_size: int) -> AttentionRows:
    """Rows of one span per sequence: (first position, end); causal."""
    table = torch.full((len(pages), max(map(len, pages)) + 1), 2**30, dtype=torch.int32)  # past the end: never read
    for i, owned in enumerate(pages):
        table[i, : len(owned)] = torch.tensor(owned)
    seq = [i for i, (start, end) in enumerate(spans) for _ in range(start, end)]
    positions = [p for start, end in spans for p in range(start, end)]
    slots = [pages[s][p // page_size] * page_size + p % page_size for s, p in zip(seq, positions, strict=True)]
    bounds = [0]
    for start, end in spans:
        bounds.append(bounds[-1] + end - start)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    visible = ints(positions) + 1
    return AttentionRows(table, ints(seq), ints(positions), visible, torch.tensor(slots), ints(bounds))


class World:
    """KV pages of one layer for sequences of given lengths; writes go through `ops`, unwritten slots stay NaN."""

    def __init__(self, ops: Ops, shape: Shape, lengths: list[int], seed: int = 0) -> None:
        self.ops, self.shape = ops, shape
        generator = torch.Generator().manual_seed(seed)
        num = [-(-length // shape.page_size) for length in lengths]
        order = torch.randperm(sum(num) + 1, generator=generator).tolist()
        self.pages = [[order.pop() for _ in range(n)] for n in num]
        self.k, self.v = ops.allocate_kv(
            sum(num) + 1, shape.page_size, shape.num_kv, shape.head_dim, shape.dtype, torch.device("cpu")
        )
        self.k.fill_(float("nan"))
        self.v.fill_(float("nan"))
        features = (shape.num_q + 2 * shape.num_kv) * shape.head_dim
        self.qkv = [torch.randn(n, features, generator=generator).to(shape.dtype) for n in lengths]
        angles = torch.rand(max(lengths), shape.head_dim // 2, generator=generator) * 6.28
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)

    def step(self, spans: dict[int, tuple[int, int]], window: int | None = None) -> Tensor:
        """Write and attend the given (first position, end) of each sequence; returns [rows, Q, D]."""
        s = self.shape
        chosen = sorted(spans)
        rows = rows_of([spans[i] for i in chosen], [self.pages[i] for i in chosen], s.page_size)
        qkv = torch.cat([self.qkv[i][slice(*spans[i])] for i in chosen])
        q = self.ops.qkv_rope_write(
            qkv, s.num_q, s.num_kv, s.head_dim, self.cos_sin, None, None, 1e-6, self.k, self.v, rows
        )
        return self.ops.paged_attention(q, self.k, self.v, rows, s.head_dim**-0.5, window)

# ruff: noqa: T201
"""`python -m kernels.cpu.prefill_bench`: attention of a prompt's chunk, block-sparse against dense, in one layer.

One process, every round times all: a ratio is the median of its rounds' ratios, beside the least and the greatest. Keys
of a tile have a direction in common, of `--strength`, and each query tile likes that of a few tiles: the share of tiles
that a threshold keeps is measured with it. `--cpu-time` is for a busy machine: one thread's own time.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch import Tensor

from kernels.cpu.bench import Shape, rows_for
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows
from kernels.prefill_rows import PrefillPart, with_parts
from kernels.sparse_prefill import PermutedBlocks, XAttention, permuted_blocks, query_tiles, x_attention

ROUNDS = 7
TILE, REGION = 128, 512
Method = XAttention | PermutedBlocks


class Bench:
    """A chunk [start, end) of one prompt, its keys and values in pages of one layer."""

    def __init__(self, ops: CpuOps, shape: Shape, start: int, end: int, strength: float) -> None:
        self.ops, self.shape, self.start, self.end = ops, shape, start, end
        generator = torch.Generator().manual_seed(1)
        num_tiles, dim = -(-end // TILE), shape.head_dim
        means = torch.randn(num_tiles, shape.kv_heads, dim, generator=generator) * strength
        liked = torch.randint(0, num_tiles, (num_tiles, 3), generator=generator)
        of_key, of_row = torch.arange(end) // TILE, torch.arange(start, end) // TILE
        self.k = torch.randn(end, shape.kv_heads, dim, generator=generator) + means[of_key]
        q = torch.randn(end - start, shape.heads, dim, generator=generator)
        group = shape.heads // shape.kv_heads
        self.q = (q + means[liked].mean(1)[of_row].repeat_interleave(group, 1)).bfloat16()
        self.k = self.k.bfloat16()
        self.rows, num_pages = rows_for([(start, end)], shape.page_size)
        self.kv = ops.allocate_kv(num_pages, shape.page_size, shape.kv_heads, dim, torch.bfloat16, torch.device("cpu"))
        self._write()

    def _write(self) -> None:
        rows, _ = rows_for([(0, self.end)], self.shape.page_size)
        s, values = self.shape, torch.randn(self.end, self.shape.kv_heads, self.shape.head_dim).bfloat16()
        q = torch.zeros(self.end, s.heads, s.head_dim).bfloat16()
        plain = torch.cat((torch.ones(self.end, s.head_dim // 2), torch.zeros(self.end, s.head_dim // 2)), 1)
        qkv = torch.cat((q, self.k, values), 1).flatten(1)
        self.ops.qkv_rope_write(qkv, s.heads, s.kv_heads, s.head_dim, plain, None, None, 1e-6, *self.kv, rows)

    def sparse(self, method: Method) -> AttentionRows:
        step = REGION if isinstance(method, PermutedBlocks) else self.end - self.start
        firsts = range(self.start, self.end, step)
        return with_parts(self.rows, [PrefillPart(at - self.start, step, at, 0, method) for at in firsts])

    def attend(self, rows: AttentionRows) -> Tensor:
        return self.ops.paged_attention(self.q, *self.kv, rows, self.shape.head_dim**-0.5)

    def share(self, method: Method) -> float:
        """Of the tiles that dense attention reads those that are read here, of the chunk's last region."""
        first, scale = self.end - REGION, self.shape.head_dim**-0.5
        q, before = self.q[first - self.start :], sum(query_tiles(first, self.end, TILE))
        if isinstance(method, XAttention):
            keep = x_attention(q, self.k, first, method, scale)
            return float(keep.sum()) / self.shape.kv_heads / (before + keep.shape[1])
        kept = permuted_blocks(q, self.k, first, method, scale).keep
        own = sum(tile % (method.segment // TILE) + 1 for tile in query_tiles(first, self.end, TILE))
        return (float(kept.sum()) / self.shape.kv_heads + own) / (before + kept.shape[1])


def times(bench: Bench, methods: list[Method], cpu: bool) -> list[str]:
    """Dense time over that of each method: median (least - greatest) of the rounds."""
    clock = time.thread_time if cpu else time.perf_counter
    steps = [bench.rows, *(bench.sparse(method) for method in methods)]
    found = []
    for _ in range(ROUNDS + 1):
        taken = []
        for rows in steps:
            start = clock()
            bench.attend(rows)
            taken.append(clock() - start)
        found.append([taken[0] / other for other in taken[1:]])
    ratios = [sorted(column) for column in zip(*found[1:], strict=True)]
    return [f"{ratio[ROUNDS // 2]:5.2f} ({ratio[0]:.2f} - {ratio[-1]:.2f})" for ratio in ratios]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m kernels.cpu.prefill_bench", description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--cpu-time", action="store_true", help="one thread's own CPU time, for a machine that is busy")
    chosen = parser.parse_args()
    ops = CpuOps(num_threads=1 if chosen.cpu_time else None)
    torch.set_num_threads(1)
    methods: list[Method] = [XAttention(threshold=chosen.threshold), PermutedBlocks(threshold=chosen.threshold)]
    print(f"{ops.name}, {ops.num_threads} threads, the last {chosen.rows} rows of a prompt")
    print("keys, method: share of tiles read; dense / sparse")
    for keys in chosen.keys:
        bench = Bench(ops, replace(Shape(), page_size=64), keys - chosen.rows, keys, chosen.strength)
        for method, ratio in zip(methods, times(bench, methods, chosen.cpu_time), strict=True):
            print(f"{keys:6d} {type(method).__name__:16s} {bench.share(method):5.2f}   {ratio}")


if __name__ == "__main__":
    main()

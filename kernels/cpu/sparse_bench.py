# ruff: noqa: T201
"""`python -m kernels.cpu.sparse_bench`: decode steps with sparse rows against the same steps with dense ones.

One process, every round times both: the ratio of a method is the median of its rounds' ratios, beside the least and the
greatest. A step is that of `bench.py`, layers and head; attention alone is that of the layers behind the dense ones.
Keys are random: what is read is spread over all pages. `--cpu-time` is for a busy machine: one thread's own time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cpu.bench import Shape, Stack, rows_for
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows
from kernels.sparse import DENSE_LAYERS, Method, SparseLayer, SparseRows, default_channels, roles_of_layers

ROUNDS = 9


@dataclass(frozen=True)
class Case:
    """Sequences that each bring a row over `keys` keys, and the labels of these; of 4 bits or as the keys are."""

    num_seqs: int
    keys: int
    budget: int
    num_channels: int
    int4_labels: bool


class Bench:
    """The weights, and one case's KV memory."""

    def __init__(self, stack: Stack, case: Case) -> None:
        self.stack, self.case, shape = stack, case, stack.shape
        self.dense, num_pages = rows_for([(case.keys, case.keys + 1)] * case.num_seqs, shape.page_size)
        self.kv = stack.kv(num_pages)
        for pages in self.kv:
            for tensor in pages:
                tensor.normal_()
        channels = torch.arange(case.num_channels, dtype=torch.int32).repeat(shape.kv_heads, 1)
        roles = roles_of_layers(shape.layers, DENSE_LAYERS, (round(shape.layers * 13 / 32),))
        self.layers = [
            stack.ops.allocate_sparse(k, r, True, channels, case.int4_labels)
            for (k, _), r in zip(self.kv, roles, strict=True)
        ]
        for layer in self.layers:
            for part in (layer.bounds, layer.labels, layer.label_scales):
                if part is not None:
                    part.normal_() if part.is_floating_point() else part.random_(256)
        self.x = torch.randn(case.num_seqs, shape.hidden).bfloat16()
        self.q = torch.randn(case.num_seqs, shape.heads, shape.head_dim).bfloat16()

    def rows(self, method: Method) -> AttentionRows:
        count, budget = self.case.num_seqs, self.case.budget
        lists = torch.zeros((count, self.stack.shape.kv_heads, budget), dtype=torch.int32)
        sparse = SparseRows(
            torch.arange(count, dtype=torch.int32),
            torch.full((count,), method, dtype=torch.int32),
            torch.full((count,), budget, dtype=torch.int32),
            lists,
        )
        return replace(self.dense, sparse=sparse, layers=self.layers)

    def step(self, rows: AttentionRows) -> None:
        self.stack.step(self.x, rows, self.kv, self.case.num_seqs)

    def attention(self, rows: AttentionRows) -> None:
        """All layers behind the dense ones, without their products."""
        shape = self.stack.shape
        for (k, v), layer in list(zip(self.kv, self.layers, strict=True))[DENSE_LAYERS:]:
            self._attend(rows, k, v, layer, shape.head_dim**-0.5)

    def _attend(self, rows: AttentionRows, k: Tensor, v: Tensor, layer: SparseLayer, scale: float) -> None:
        self.stack.ops.paged_attention(self.q, k, v, rows, scale, layer=layer)


def ratios(call: Callable[[AttentionRows], None], dense: AttentionRows, sparse: AttentionRows, cpu: bool) -> str:
    """Dense time over sparse time: median (least - greatest) of the rounds."""
    clock = time.thread_time if cpu else time.perf_counter
    found = []
    for _ in range(ROUNDS + 1):
        times = []
        for rows in (dense, sparse):
            start = clock()
            call(rows)
            times.append(clock() - start)
        found.append(times[0] / times[1])
    found = sorted(found[1:])
    return f"{found[len(found) // 2]:5.2f} ({found[0]:.2f} - {found[-1]:.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m kernels.cpu.sparse_bench", description=__doc__)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--share", type=int, default=16, help="a row reads one key of so many")
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--methods", nargs="+", default=[method.name.lower() for method in Method])
    parser.add_argument("--label-dtype", choices=("model", "int4"), default="model")
    parser.add_argument("--channels", type=int, help="of a label; otherwise as a server has them")
    parser.add_argument("--cpu-time", action="store_true", help="one thread's own CPU time, for a machine that is busy")
    chosen = parser.parse_args()
    ops = CpuOps(num_threads=1 if chosen.cpu_time else None)
    stack = Stack(ops, Shape())
    budget, int4_labels = chosen.keys // chosen.share, chosen.label_dtype == "int4"
    num_channels = chosen.channels or default_channels(stack.shape.head_dim, int4_labels)
    print(f"{ops.name}, {ops.num_threads} threads, {chosen.keys} keys, budget {budget}")
    print(f"labels of {num_channels} channels, {'codes of 4 bits' if int4_labels else 'as the keys are'}")
    print("sequences, method: attention, dense / sparse; whole step, dense / sparse")
    for num_seqs in chosen.seqs:
        bench = Bench(stack, Case(num_seqs, chosen.keys, budget, num_channels, int4_labels))
        for method in (Method[name.upper()] for name in chosen.methods):
            rows = bench.rows(method)
            attention = ratios(bench.attention, bench.dense, rows, chosen.cpu_time)
            step = ratios(bench.step, replace(bench.dense, layers=bench.layers), rows, chosen.cpu_time)
            print(f"{num_seqs:3d} {method.name.lower():21s} {attention}   {step}")


if __name__ == "__main__":
    main()

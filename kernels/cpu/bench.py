# ruff: noqa: T201
"""`python -m kernels.cpu.bench`: the machine's limits and what the kernels make of them, in one run.

Prints read bandwidth, large-matrix rate, the floor of a decoder step (weight bytes / bandwidth), and then steps of the
call sequence that a Llama of the given shape makes, without the model's and the engine's code around it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers, MlpBlock
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows, PackedLinear


@dataclass(frozen=True)
class Shape:
    """A dense Llama; the default is the 160m shape of the issue."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    head_dim: int = 64
    mlp: int = 3072
    vocab: int = 8192
    page_size: int = 32


def seconds(call: Callable[[], object], budget_s: float = 0.5, cpu_time: bool = False) -> float:
    """Median time of a call over at least three repeats, or the least CPU time that the calling thread spent on it."""
    clock = time.thread_time if cpu_time else time.perf_counter
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget_s:
        start = clock()
        call()
        times.append(clock() - start)
    return min(times) if cpu_time else sorted(times)[len(times) // 2]


class Stack:
    """The packed weights of every layer and the calls of a step."""

    def __init__(self, ops: CpuOps, shape: Shape) -> None:
        self.ops, self.shape = ops, shape
        s = shape
        self.norm = torch.ones(s.hidden, dtype=torch.bfloat16)
        angles = torch.rand(1 << 15, s.head_dim // 2)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
        self.run = DenseLayers(tuple(self._layer(index) for index in range(s.layers)))
        self.head = self._weight(s.vocab, s.hidden)

    def _layer(self, index: int) -> tuple[AttentionBlock, MlpBlock]:
        s = self.shape
        qkv = self._weight((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden)
        out = self._weight(s.hidden, s.heads * s.head_dim)
        attention = AttentionBlock(
            self.norm, qkv, out, None, None, s.heads, s.kv_heads, s.head_dim, self.cos_sin, 1e-5, s.head_dim**-0.5,
            None, index,
        )  # fmt: skip
        return attention, MlpBlock(self.norm, self._weight(2 * s.mlp, s.hidden), self._weight(s.hidden, s.mlp), 1e-5)

    @property
    def num_bytes(self) -> int:
        layers = sum(w.num_bytes for a, m in self.run.layers for w in (a.qkv, a.out, m.gate_up, m.down))
        return layers + self.head.num_bytes

    def _weight(self, n: int, k: int) -> PackedLinear:
        return self.ops.pack_linear((torch.randn(n, k) * k**-0.5).bfloat16())

    def kv(self, num_pages: int) -> list[tuple[Tensor, Tensor]]:
        s = self.shape
        pairs = [
            self.ops.allocate_kv(num_pages, s.page_size, s.kv_heads, s.head_dim, torch.bfloat16, torch.device("cpu"))
            for _ in range(s.layers)
        ]
        for k, v in pairs:
            k.zero_(), v.zero_()
        return pairs

    def step(self, x: Tensor, rows: AttentionRows | None, kv: list[tuple[Tensor, Tensor]], judged: int) -> Tensor:
        ops = self.ops
        if rows is not None:
            x = ops.dense_layers(x, self.run, kv, rows)
        else:  # the products alone, with what glue they have
            for attention, mlp in self.run.layers:
                y = ops.linear(ops.rms_norm(x, self.norm, 1e-5), attention.qkv)
                x = ops.linear(y[:, : self.shape.heads * self.shape.head_dim], attention.out, x)
                hidden = ops.linear(ops.rms_norm(x, self.norm, 1e-5), mlp.gate_up)
                x = ops.linear(ops.silu_mul(hidden), mlp.down, x)
        return ops.logits(ops.rms_norm(x[-judged:], self.norm, 1e-5), self.head)


def rows_for(lengths: list[tuple[int, int]], page_size: int) -> tuple[AttentionRows, int]:
    """Rows of one span (first position, end) per sequence, and the number of pages they need."""
    owned = [-(-end // page_size) for _, end in lengths]
    table = torch.zeros((len(lengths), max(owned)), dtype=torch.int32)
    pages = torch.split(torch.randperm(sum(owned)), owned)
    for i, ids in enumerate(pages):
        table[i, : len(ids)] = ids
    seq = torch.tensor([i for i, (start, end) in enumerate(lengths) for _ in range(start, end)], dtype=torch.int32)
    at = torch.tensor([p for start, end in lengths for p in range(start, end)], dtype=torch.int32)
    slots = table[seq.long(), (at // page_size).long()].long() * page_size + at % page_size
    bounds = torch.tensor([0, *(end - start for start, end in lengths)]).cumsum(0).int()
    return AttentionRows(table, seq, at, at + 1, slots, bounds), sum(owned)


def machine(threads: int, cpu_time: bool) -> tuple[float, float]:
    """Read bandwidth in bytes/s (an integer sum over 512 MB) and torch's best large bf16 product in FLOP/s."""
    torch.set_num_threads(threads)
    words = torch.ones(64 << 20, dtype=torch.int64)
    bandwidth = max(words.nbytes / seconds(words.sum, 0.3, cpu_time) for _ in range(3))
    del words
    x, w = torch.randn(2048, 3072).bfloat16(), torch.randn(3072, 3072).bfloat16()
    rate = max(
        2 * 2048 * 3072 * 3072 / seconds(lambda: torch.nn.functional.linear(x, w), 0.3, cpu_time) for _ in range(2)
    )
    return bandwidth, rate


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m kernels.cpu.bench", description=__doc__)
    parser.add_argument("--threads", type=int, help="default: the cores this process may run on")
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread's own CPU time, least of its runs: for a machine that is busy",
    )
    chosen = parser.parse_args()
    busy = chosen.cpu_time
    if busy and chosen.threads not in (None, 1):
        parser.error("--cpu-time measures one thread: leave --threads out or pass 1")
    ops, shape = CpuOps(chosen.quantization, 1 if busy else chosen.threads), Shape()
    bandwidth, rate = machine(ops.num_threads, busy)
    stack = Stack(ops, shape)
    floor = stack.num_bytes / bandwidth
    print(
        f"{ops.name}, {ops.num_threads} threads: read {bandwidth / 1e9:.1f} GB/s, large bf16 {rate / 1e9:.0f} GFLOP/s"
    )
    print(f"weights {stack.num_bytes / 1e6:.0f} MB, floor {floor * 1e3:.2f} ms a step")
    flops = 2 * stack.num_bytes / 2 if chosen.quantization is None else 0
    for count, keys in [
        (1, 64),
        (1, 1024),
        (2, 64),
        (4, 64),
        (8, 64),
        (8, 288),
        (16, 64),
        (32, 64),
        (32, 288),
        (64, 64),
    ]:
        rows, pages = rows_for([(keys, keys + 1)] * count, shape.page_size)
        kv, x = stack.kv(pages), torch.randn(count, shape.hidden).bfloat16()
        dense = seconds(lambda: stack.step(x, None, kv, count), cpu_time=busy)  # noqa: B023
        full = seconds(lambda: stack.step(x, rows, kv, count), cpu_time=busy)  # noqa: B023
        kv_bytes = 4 * count * keys * shape.kv_heads * shape.head_dim * shape.layers
        print(
            f"decode {count:3d} rows x {keys:4d} keys: {full * 1e3:6.2f} ms = {full / floor:.2f} floors"
            f" (products {dense * 1e3:6.2f} ms = {dense / floor:.2f}, {flops * count / dense / rate:.0%} of the rate;"
            f" KV bytes need {kv_bytes / bandwidth * 1e3:.2f} ms)"
        )
    for length in (128, 512, 1024):
        rows, pages = rows_for([(0, length)], shape.page_size)
        kv, x = stack.kv(pages), torch.randn(length, shape.hidden).bfloat16()
        took = seconds(lambda: stack.step(x, rows, kv, 1), cpu_time=busy)  # noqa: B023
        print(f"prefill {length:4d} tokens: {took * 1e3:6.1f} ms = {flops * length / took / rate:.0%} of the rate")
    logits = torch.randn(32, shape.vocab)
    zeros = torch.zeros(32, dtype=torch.int64)
    for greedy in (False, True):
        flags = torch.full((32,), greedy)
        took = seconds(lambda: ops.sample(logits, zeros, zeros, zeros, flags), 0.1, busy)  # noqa: B023
        print(f"sample 32 x {shape.vocab}, greedy={greedy}: {took * 1e3:.2f} ms")


if __name__ == "__main__":
    main()

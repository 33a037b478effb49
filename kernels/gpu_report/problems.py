"""From a case to tensors: random keys in shuffled pages, as many copies of them as no cache can hold, and the queries.

The same values serve our kernel and every baseline; a baseline that wants no pages gets them gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.gpu_report.cases import Case, Heads
from kernels.ops import AttentionRows
from kernels.triton.gpu_checks import Span, World, make_world
from kernels.triton.ops import TritonOps

PAGE = 64
_ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
_WRITE_ROWS = 8192


@dataclass(frozen=True)
class Problem:
    """A step ready to run. pools: (k_pages, v_pages) of equal shape and different values; each run takes the next."""

    case: Case
    world: World
    pools: tuple[tuple[Tensor, Tensor], ...]
    scale: float

    @property
    def rows(self) -> AttentionRows:
        return self.world.rows

    @property
    def q_TQD(self) -> Tensor:
        return self.world.q_TQD

    def groups(self) -> list[Group]:
        """Its spans by shape, in order of their first."""
        found: dict[Span, list[int]] = {}
        for index, span in enumerate(self.case.spans):
            found.setdefault(span, []).append(index)
        return [Group(self, span, tuple(indices)) for span, indices in found.items()]


@dataclass(frozen=True)
class Group:
    """Spans of one shape: N sequences of R rows over L keys."""

    problem: Problem
    span: Span
    indices: tuple[int, ...]

    def row_ids(self) -> Tensor:
        """int64 [N, R]: where their rows stand among the step's."""
        starts = self.problem.rows.span_starts[:-1].long()[torch.tensor(self.indices, device=self.device)]
        return starts[:, None] + torch.arange(self.span.num_rows, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.problem.q_TQD.device

    def queries(self) -> Tensor:
        """[N, Q, R, D], contiguous."""
        return self.problem.q_TQD[self.row_ids()].transpose(1, 2).contiguous()

    def page_ids(self, page: int) -> Tensor:
        """int64 [N, pages of a sequence]."""
        chosen = torch.tensor(self.indices, device=self.device)
        return self.problem.rows.page_table[chosen, : -(-self.span.kv_len // page)].long()

    def keys(self, pages: Tensor) -> Tensor:
        """Keys (or values) of one pool, gathered: [N, K, L, D], contiguous."""
        found = pages[self.page_ids(pages.shape[2])].transpose(1, 2).flatten(2, 3)
        return found[:, :, : self.span.kv_len].contiguous()


class NotApplicableError(Exception):
    """A baseline cannot run this case here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A kernel ready for a problem.

    run   on pool i
    rows  what `run` gave as [T, Q, D], for comparing; None where there is nothing to compare
    """

    run: Callable[[int], object]
    rows: Callable[[Any], Tensor] | None


Baseline = Callable[[Problem], Prepared]


def make_problem(
    ops: TritonOps, case: Case, device: torch.device, cache_bytes: int, read_bytes: int | None = None
) -> Problem:
    """Raises torch's out-of-memory error if the device cannot hold it.

    cache_bytes  of the device's last cache: what is read of the copies of the KV makes at least three times as many
    read_bytes   that a call reads of one copy; None = all of it
    """
    heads = case.heads
    dtype = case.kv_dtype if case.kv_dtype in _ACTIVATIONS else torch.bfloat16
    world = make_world(case.spans, heads.num_q, heads.num_kv, heads.head_dim, PAGE, dtype, device)
    if case.shared_keys:
        table = world.rows.page_table.clone()
        table[:, : case.shared_keys // PAGE] = table[0, : case.shared_keys // PAGE]
        world = replace(world, rows=replace(world.rows, page_table=table))
    num_copies = max(1, -(-3 * cache_bytes // (read_bytes or case.num_bytes)))
    pools = [(world.k_pages, world.v_pages)]
    if case.kv_dtype != dtype:
        pools = [_written_pages(ops, heads, world, case.kv_dtype)]
    while len(pools) < num_copies:
        if case.kv_dtype == dtype:
            pools.append((torch.randn_like(world.k_pages), torch.randn_like(world.v_pages)))
        else:
            pools.append(_written_pages(ops, heads, world, case.kv_dtype))
    return Problem(case, world, tuple(pools), heads.head_dim**-0.5)


def _written_pages(ops: TritonOps, heads: Heads, world: World, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pages of another type than the activations', written by the back end: how they are scaled is its business."""
    num_pages, _, page, _ = world.k_pages.shape
    device, head_dim = world.q_TQD.device, heads.head_dim
    k_pages, v_pages = ops.allocate_kv(num_pages, page, heads.num_kv, head_dim, dtype, device)
    table = torch.cat((torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)), 1).to(device)
    for first in range(0, num_pages * page, _WRITE_ROWS):
        slots = torch.arange(first, min(first + _WRITE_ROWS, num_pages * page), device=device)
        zeros = torch.zeros(len(slots), dtype=torch.int32, device=device)
        bounds = torch.tensor([0, len(slots)], dtype=torch.int32, device=device)
        rows = AttentionRows(world.rows.page_table, zeros, zeros, zeros + 1, slots, bounds)
        width = (heads.num_q + 2 * heads.num_kv) * head_dim
        qkv = torch.randn(len(slots), width, dtype=world.q_TQD.dtype, device=device)
        ops.qkv_rope_write(
            qkv, heads.num_q, heads.num_kv, head_dim, table, None, None, 1e-6, k_pages, v_pages, rows
        )  # fmt: skip
    return k_pages, v_pages

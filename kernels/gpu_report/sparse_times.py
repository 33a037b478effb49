"""Times sparse attention beside our dense kernel, on the same keys and in the same rounds.

Every call has a back end of its own: plans and lists that a captured graph reads live as long as whoever made them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.gpu_report.attention_times import Bench, noise, over_pools
from kernels.gpu_report.problems import Problem, make_problem
from kernels.gpu_report.results import BaselineResult, CaseResult
from kernels.gpu_report.sparse_cases import CHANNELS, ChunkVariant, Reading, RowVariant, SparseCase
from kernels.gpu_report.timing import Call, Times, free_memory, reason
from kernels.ops import AttentionRows
from kernels.sparse import Method, Role, Roles, SparseLayer, SparseRows
from kernels.sparse_prefill import XAttention
from kernels.triton.ops import TritonOps
from kernels.triton.sparse import prefill
from kernels.triton.sparse.metadata import write_metadata

DENSE, _AGAIN = "dense", "dense again"
_CHOOSING = (Role.CHOOSE, Role.CHOOSE, Role.LIST, Role.CHOOSE)
_FOLLOWING = (Role.CHOOSE, Role.CHOOSE, Role.FOLLOW, Role.CHOOSE)
_METHODS = {
    Reading.QUEST: Method.QUEST,
    Reading.DOUBLE_SPARSITY: Method.DOUBLE_SPARSITY,
    Reading.DOUBLE_SPARSITY_PAGES: Method.DOUBLE_SPARSITY_PAGES,
    Reading.TIDAL_LIST: Method.TIDAL,
    Reading.TIDAL_FOLLOW: Method.TIDAL,
}
_SLOTS_AT_ONCE = 1 << 20


def time_sparse(bench: Bench, case: SparseCase) -> list[CaseResult]:
    """A result for each variant; never raises for what one or all of them cannot do."""
    results = {variant.label: _empty(case, variant) for variant in case.variants}
    try:
        return list(_timed(bench, case, results))
    except Exception as error:
        return [replace(result, reason=reason(error)) for result in results.values()]
    finally:
        free_memory()


def run_once(bench: Bench, case: SparseCase) -> None:
    """Every call of a case, untimed, so that its kernels are compiled."""
    problem = _problem(bench, case)
    layers = _layers(bench.ops, problem, case)
    for variant in case.variants:
        _call(bench, problem, layers, variant)()
    free_memory()


def _empty(case: SparseCase, variant: RowVariant | ChunkVariant) -> CaseResult:
    dense = case.dense
    return CaseResult(
        f"{dense.label}: {variant.label}", f"sparse {dense.kind.value}", dense.heads.group, dense.heads.head_dim,
        str(dense.kv_dtype).removeprefix("torch."), len(dense.spans), dense.spans[0].kv_len,
        variant.num_bytes(dense), variant.num_flop(dense),
    )  # fmt: skip


def _problem(bench: Bench, case: SparseCase) -> Problem:
    return make_problem(bench.ops, case.dense, bench.device, bench.cache_bytes, case.least_bytes)


def _timed(bench: Bench, case: SparseCase, results: dict[str, CaseResult]) -> Iterator[CaseResult]:
    problem = _problem(bench, case)
    layers = _layers(bench.ops, problem, case)
    dense = _dense(bench, problem)
    calls: dict[str, Call] = {DENSE: dense, _AGAIN: dense}
    refused: dict[str, str] = {}
    for variant in case.variants:
        try:
            calls[variant.label] = _call(bench, problem, layers, variant)
        except Exception as error:
            refused[variant.label] = reason(error)
    found = bench.timer.time(calls)
    times = {name: t.scaled(1 / len(problem.pools)) for name, t in found.items() if isinstance(t, Times)}
    refused |= {name: why for name, why in found.items() if isinstance(why, str)}
    for label, result in results.items():
        if label in refused:
            yield replace(result, reason=refused[label])
        elif bench.timer.is_meaningful:
            yield _with_figures(bench, result, times[label], times.get(DENSE), times.get(_AGAIN), refused.get(DENSE))
        else:
            yield replace(result, baselines=(BaselineResult(DENSE, reason=refused.get(DENSE)),))


def _with_figures(
    bench: Bench, result: CaseResult, ours: Times, dense: Times | None, again: Times | None, why: str | None
) -> CaseResult:
    seconds, rates = ours.median, bench.rates
    floor_s = max(result.num_bytes / rates.copy_bytes_per_s, result.num_flop / rates.matrix_flop_per_s)
    beside = BaselineResult(DENSE, reason=why)
    if dense is not None:
        ratio = dense.over(ours)
        beside = BaselineResult(DENSE, 1e6 * dense.median, ratio.median, ratio.spread, dense.is_graph)
    return replace(
        result,
        us=1e6 * seconds,
        spread=ours.spread,
        noise=None if dense is None or again is None else noise(again.over(dense)),
        gb_s=result.num_bytes / seconds / 1e9,
        tflop_s=result.num_flop / seconds / 1e12,
        copy_fraction=result.num_bytes / seconds / rates.copy_bytes_per_s,
        floor_fraction=floor_s / seconds,
        is_graph=ours.is_graph,
        baselines=(beside,),
    )


def _dense(bench: Bench, problem: Problem) -> Call:
    ops = bench.ops.another()
    return over_pools(
        lambda pool: ops.paged_attention(problem.q_TQD, *problem.pools[pool], problem.rows, problem.scale),
        len(problem.pools),
    )


def _layers(ops: TritonOps, problem: Problem, case: SparseCase) -> list[SparseLayer]:
    """What each pool has beside its keys; nothing for a case of chunks."""
    if not any(isinstance(variant, RowVariant) for variant in case.variants):
        return []
    num_kv, head_dim = problem.case.heads.num_kv, problem.case.heads.head_dim
    channels = torch.arange(min(CHANNELS, head_dim), dtype=torch.int32, device=problem.q_TQD.device)
    layers = []
    slots = _written_slots(problem)
    for k_pages, _ in problem.pools:
        layer = ops.allocate_sparse(k_pages, _CHOOSING, True, channels.expand(num_kv, -1).contiguous())
        for part in torch.split(slots, _SLOTS_AT_ONCE):
            write_metadata(k_pages, part, layer)
        layers.append(layer)
    return layers


def _written_slots(problem: Problem) -> Tensor:
    """int64, of all keys of all sequences; those of one page ascend."""
    page, length = problem.pools[0][0].shape[2], problem.case.spans[0].kv_len
    at = torch.arange(length, device=problem.q_TQD.device)
    return (problem.rows.page_table[:, at // page].long() * page + at % page).flatten()


def _call(bench: Bench, problem: Problem, layers: Sequence[SparseLayer], variant: RowVariant | ChunkVariant) -> Call:
    if isinstance(variant, RowVariant):
        return _row_call(bench.ops.another(), problem, layers, variant)
    return _chunk_call(bench.ops, problem, variant)


def _row_call(ops: TritonOps, problem: Problem, layers: Sequence[SparseLayer], variant: RowVariant) -> Call:
    rows = _sparse_rows(problem, _METHODS[variant.reading], variant.budget)

    def run(pool: int, roles: Roles) -> Tensor:
        k_pages, v_pages = problem.pools[pool]
        layer = replace(layers[pool], roles=roles)
        return ops.paged_attention(problem.q_TQD, k_pages, v_pages, rows, problem.scale, layer=layer)

    _check_finite(run(0, _CHOOSING))
    roles = _CHOOSING
    if variant.reading is Reading.TIDAL_FOLLOW:  # the list of the layer that has just run
        roles = _FOLLOWING
        _check_finite(run(0, roles))
    return over_pools(lambda pool: run(pool, roles), len(problem.pools))


def _sparse_rows(problem: Problem, method: Method, budget: int) -> AttentionRows:
    """Every row of the step under one method."""
    rows, device = problem.rows, problem.q_TQD.device
    num_rows = len(rows.visible)
    lists = None
    if method is Method.TIDAL:
        shape = (num_rows, problem.case.heads.num_kv, budget)
        lists = torch.full(shape, -1, dtype=torch.int32, device=device)
    filled = [torch.full((num_rows,), value, dtype=torch.int32, device=device) for value in (int(method), budget)]
    index = torch.arange(num_rows, dtype=torch.int32, device=device)
    return replace(rows, sparse=SparseRows(index, filled[0], filled[1], lists))


def _chunk_call(ops: TritonOps, problem: Problem, variant: ChunkVariant) -> Call:
    span, method, attention = problem.case.spans[0], variant.method, ops.another_attention()
    start, table = span.kv_len - span.num_rows, problem.rows.page_table[0]

    def run(pool: int) -> Tensor:
        k_pages, v_pages = problem.pools[pool]
        chunk = (attention, problem.q_TQD, k_pages, v_pages, table, start)
        if isinstance(method, XAttention):
            return prefill.x_attention(*chunk, method, problem.scale)
        return prefill.permuted_blocks(*chunk, method, problem.scale)

    _check_finite(run(0))
    return over_pools(run, len(problem.pools))


def _check_finite(out: Tensor) -> None:
    """Keys behind the last are NaN in memory: a list that names one would show. What is chosen `checks` compares."""
    if not math.isfinite(float(out.float().sum())):
        raise ValueError("its result is not finite")

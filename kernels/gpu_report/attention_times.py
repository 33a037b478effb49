"""Times each case of attention beside every baseline, on the same values and in the same rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.gpu_report.cases import Case
from kernels.gpu_report.problems import Baseline, NotApplicableError, Prepared, Problem, make_problem
from kernels.gpu_report.results import BaselineResult, CaseResult
from kernels.gpu_report.timing import Call, Rates, Ratio, Timer, Times, device_seconds, free_memory, reason
from kernels.triton.ops import TritonOps

_OURS, _AGAIN = "ours", "ours again"
_SLOW_TO_PREPARE = "flex"


@dataclass(frozen=True)
class Bench:
    """What all cases share. num_plans: runs of which the fastest is the host time of a plan."""

    ops: TritonOps
    device: torch.device
    timer: Timer
    rates: Rates
    cache_bytes: int
    baselines: Mapping[str, Baseline]
    num_plans: int = 20


def time_case(bench: Bench, case: Case) -> CaseResult:
    """Never raises for what the case or a baseline cannot do: the reason stands in the result."""
    result = CaseResult(
        case.label, case.kind.value, case.heads.group, case.heads.head_dim,
        str(case.kv_dtype).removeprefix("torch."), len(case.spans), max(span.kv_len for span in case.spans),
        case.num_bytes, case.num_flop,
    )  # fmt: skip
    try:
        return _timed(bench, case, result)
    except Exception as error:
        return replace(result, reason=reason(error))
    finally:
        free_memory()


def _timed(bench: Bench, case: Case, result: CaseResult) -> CaseResult:
    problem = make_problem(bench.ops, case, bench.device, bench.cache_bytes)
    ours = _ours(bench, problem)
    calls: dict[str, Call] = {_OURS: ours, _AGAIN: ours}
    num_runs = dict.fromkeys(calls, len(problem.pools))
    for number, spans in enumerate(case.parts):
        part = make_problem(bench.ops, replace(case, spans=spans, parts=()), bench.device, bench.cache_bytes)
        calls[f"part {number}"], num_runs[f"part {number}"] = _ours(bench, part), len(part.pools)
    expected = _attention(bench, problem, 0)
    refused: dict[str, str] = {}
    for name, baseline in bench.baselines.items():
        if name == _SLOW_TO_PREPARE and not case.with_flex:
            refused[name] = "not asked for in this case"
            continue
        try:
            prepared = baseline(problem)
            _compare(prepared, expected)
            calls[name], num_runs[name] = over_pools(prepared.run, len(problem.pools)), len(problem.pools)
        except NotApplicableError as error:
            refused[name] = str(error)
        except Exception as error:
            refused[name] = reason(error)
    found = bench.timer.time(calls)
    times = {name: t.scaled(1 / num_runs[name]) for name, t in found.items() if isinstance(t, Times)}
    refused |= {name: why for name, why in found.items() if isinstance(why, str)}
    if _OURS not in times:
        return replace(result, reason=refused[_OURS])
    compared = tuple(_beside(name, times, refused, bench.timer.is_meaningful) for name in bench.baselines)
    result = replace(result, baselines=compared)
    if not bench.timer.is_meaningful:
        return result
    return _with_figures(bench, problem, result, times)


def _with_figures(bench: Bench, problem: Problem, result: CaseResult, times: Mapping[str, Times]) -> CaseResult:
    ours, case, rates = times[_OURS], problem.case, bench.rates
    seconds = ours.median
    parts = [times.get(f"part {number}") for number in range(len(case.parts))]
    return replace(
        result,
        us=1e6 * seconds,
        spread=ours.spread,
        noise=noise(times[_AGAIN].over(ours)) if _AGAIN in times else None,
        gb_s=case.num_bytes / seconds / 1e9,
        tflop_s=case.num_flop / seconds / 1e12,
        copy_fraction=case.num_bytes / seconds / rates.copy_bytes_per_s,
        floor_fraction=case.floor_s(rates.copy_bytes_per_s, rates.matrix_flop_per_s) / seconds,
        parts_ratio=ratio_to_parts(ours, parts),
        plan_us=1e6 * plan_seconds(bench, problem),
        combine_share=combine_share(device_seconds(lambda: _attention(bench, problem, 0))),
        is_graph=ours.is_graph,
    )


def ratio_to_parts(ours: Times, parts: list[Times | None]) -> float | None:
    """Median over rounds of ours / sum of the parts; None without parts or with one that was not timed."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    total = known[0]
    for part in known[1:]:
        total = total.plus(part)
    return ours.over(total).median


def noise(ratio: Ratio) -> float:
    """Of a kernel over itself."""
    return abs(ratio.median - 1) + ratio.spread


def combine_share(by_kernel: Mapping[str, float]) -> float | None:
    total = sum(by_kernel.values())
    return sum(s for name, s in by_kernel.items() if name.startswith(("combine", "merge"))) / total if total else None


def plan_seconds(bench: Bench, problem: Problem) -> float:
    """What a step pays on the host before its first layer: a call that plans, less one that finds its plan; minima."""
    first = later = math.inf
    for _ in range(bench.num_plans):
        fresh = replace(problem, world=replace(problem.world, rows=replace(problem.rows)))
        first = min(first, _host_seconds(bench, fresh))
        later = min(later, _host_seconds(bench, fresh))
    return max(0.0, first - later)


def _host_seconds(bench: Bench, problem: Problem) -> float:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    _attention(bench, problem, 0)
    return time.perf_counter() - start


def _attention(bench: Bench, problem: Problem, pool: int) -> Tensor:
    return bench.ops.paged_attention(problem.q_TQD, *problem.pools[pool], problem.rows, problem.scale)


def _ours(bench: Bench, problem: Problem) -> Call:
    """By a back end of its own: another step's plan would take the place of the one that a captured graph reads."""
    own = replace(bench, ops=bench.ops.another())
    return over_pools(lambda pool: _attention(own, problem, pool), len(problem.pools))


def over_pools(run: Callable[[int], object], num_pools: int) -> Call:
    """Once on each copy of the keys."""

    def call() -> None:
        for pool in range(num_pools):
            run(pool)

    return call


def _compare(prepared: Prepared, expected: Tensor) -> None:
    """Raises NotApplicableError where the baseline answers another question than we: its time would mean nothing."""
    out = prepared.run(0)
    if prepared.rows is None:
        return
    error = float((prepared.rows(out).float() - expected.float()).norm() / expected.float().norm())
    # Two roundings of 16 bits differ by 0.5 %; one wrong key of 4,000 does not show here, a wrong mask does.
    if not error <= 0.02:
        raise NotApplicableError(f"its result differs from ours by {error:.1%}")


def _beside(
    name: str, times: Mapping[str, Times], refused: Mapping[str, str], is_meaningful: bool
) -> BaselineResult:  # fmt: skip
    if name not in times:
        return BaselineResult(name, reason=refused[name])
    if not is_meaningful:
        return BaselineResult(name)
    ratio = times[name].over(times[_OURS])
    return BaselineResult(name, 1e6 * times[name].median, ratio.median, ratio.spread, times[name].is_graph)

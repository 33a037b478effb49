"""The goals in numbers (`attention.md` 1.3, and of serving end to end) held against what a run found.

"limit" is what we ship with, "goal" what we want (of serving no more than the limit; of ratios to other kernels the
reference names the goals alone; the limit is not to be slower). A goal whose cases were not timed is "not measured",
never met. Where several cases belong to one goal the worst of them decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from kernels.gpu_report.cases import Kind
from kernels.gpu_report.results import CaseResult, Report, Verdict
from kernels.gpu_report.sparse_cases import Reading, RowVariant

Pairs = Iterable[tuple[str, float | None]]


def at_least(name: str, figures: Pairs, limit: float, goal: float) -> Verdict:
    return _judge(name, figures, limit, goal, is_at_least=True)


def at_most(name: str, figures: Pairs, limit: float, goal: float) -> Verdict:
    return _judge(name, figures, limit, goal, is_at_least=False)


def _judge(name: str, figures: Pairs, limit: float, goal: float, is_at_least: bool) -> Verdict:
    known = [(figure, case) for case, figure in figures if figure is not None and not math.isnan(figure)]
    if not known:
        return Verdict(name, "not measured", None, limit, goal, is_at_least)
    worst, case = min(known) if is_at_least else max(known)

    def reaches(bound: float) -> bool:
        return worst >= bound if is_at_least else worst <= bound

    outcome = "goal" if reaches(goal) else "met" if reaches(limit) else "missed"
    return Verdict(name, outcome, worst, limit, goal, is_at_least, f"worst of {len(known)}: {case}")


def all_verdicts(report: Report) -> list[Verdict]:
    return [*attention_verdicts(report.cases), *sparse_verdicts(report.sparse), *serving_verdicts(report.serving)]


def attention_verdicts(cases: Sequence[CaseResult]) -> list[Verdict]:
    """Of cases with figures; bfloat16, head size 128 and groups of 4 and 8 unless the goal says otherwise."""
    usual = [c for c in cases if c.kv_dtype == "bfloat16" and c.head_dim == 128 and c.group in (4, 8)]
    decodes = [c for c in usual if c.kind == Kind.DECODE]
    batches = [c for c in decodes if c.batch >= 32 and 2048 <= c.keys <= 32768]
    lone = [c for c in decodes if c.batch == 1 and c.keys >= 32768]
    skewed = [c for c in usual if c.kind == Kind.SKEW]
    prefills = [c for c in usual if c.kind == Kind.PREFILL and c.keys >= 8192]

    def of(kind: Kind, figure: Callable[[CaseResult], float | None]) -> list[tuple[str, float | None]]:
        return _pairs([c for c in usual if c.kind == kind], figure)

    return [
        at_least("decode, batch 32-128: share of the copy rate", _pairs(batches, _copy_fraction), 0.80, 0.92),
        at_least("decode, one sequence: share of the copy rate", _pairs(lone, _copy_fraction), 0.75, 0.90),
        at_most("skewed decode: time over what its bytes need", _pairs(skewed, _over_bytes), 1.25, 1.10),
        at_most("verify 2-8 rows: time over one-row decode", of(Kind.VERIFY, _parts_ratio), 1.15, 1.05),
        at_most("denoise 32 rows: time over one-row decode", of(Kind.DENOISE, _parts_ratio), 1.4, 1.2),
        at_most("draft trees: time over one-row decode", of(Kind.TREE, _parts_ratio), 1.4, 1.3),
        at_most("mixed step: time over the sum of its parts", of(Kind.MIXED, _parts_ratio), 1.10, 1.0),
        at_least("causal prefill 8k and more: TFLOP/s", _pairs(prefills, lambda c: c.tflop_s), 380, 470),
        at_most("fp8 pages: time per key over bfloat16's", fp8_slopes(cases), 0.62, 0.55),
        at_least("decode over vLLM-like: its time / ours", _ratios(batches, "vllm-like"), 1.0, 1.4),
        at_least("prefill over vLLM-like: its time / ours", _ratios(prefills, "vllm-like"), 1.0, 2.0),
        at_least("skewed decode over a fixed split: its time / ours", _ratios(skewed, "fixed split"), 1.0, 2.0),
        at_least("decode over FlashAttention 3: its time / ours", _ratios(batches, "flash-attn 3"), 0.85, 0.95),
    ]


def sparse_verdicts(cases: Sequence[CaseResult]) -> list[Verdict]:
    """Of the goals of sparse attention the one that random keys can show; others are of whole models or of texts."""
    labels = [
        case
        for case in cases
        if case.batch == 8
        and case.keys >= 32768
        and case.case.endswith(f": {RowVariant(Reading.DOUBLE_SPARSITY, case.keys // 16).label}")
    ]
    return [at_least("Double Sparsity, 1/16 of 32k+ keys, batch 8: dense / ours", _ratios(labels, "dense"), 4.0, 7.0)]


def _pairs(
    cases: Iterable[CaseResult], figure: Callable[[CaseResult], float | None]
) -> list[tuple[str, float | None]]:  # fmt: skip
    return [(case.case, figure(case)) for case in cases]


def _copy_fraction(case: CaseResult) -> float | None:
    return case.copy_fraction


def _over_bytes(case: CaseResult) -> float | None:
    return None if not case.copy_fraction else 1 / case.copy_fraction


def _parts_ratio(case: CaseResult) -> float | None:
    return case.parts_ratio


def _ratios(cases: Iterable[CaseResult], baseline: str) -> list[tuple[str, float | None]]:
    return _pairs(cases, lambda case: case.ratio_to(baseline))


def fp8_slopes(cases: Sequence[CaseResult]) -> list[tuple[str, float | None]]:
    """(time at more keys - time at fewer) of fp8 pages over the same of bfloat16, for each pair of a batch's cases."""
    times: dict[tuple[int, int, int], dict[str, dict[int, float]]] = {}
    for case in cases:
        if case.kind == Kind.DECODE and case.us is not None:
            shape = times.setdefault((case.batch, case.group, case.head_dim), {})
            shape.setdefault(case.kv_dtype, {})[case.keys] = case.us
    found: list[tuple[str, float | None]] = []
    for (batch, _, _), by_type in times.items():
        fp8, plain = by_type.get("float8_e4m3fn", {}), by_type.get("bfloat16", {})
        common = sorted(fp8.keys() & plain.keys())
        if len(common) > 1:
            few, many = common[0], common[-1]
            slope = plain[many] - plain[few]
            ratio = (fp8[many] - fp8[few]) / slope if slope > 0 else None
            found.append((f"batch {batch}, {few} to {many} keys", ratio))
    return found


def serving_verdicts(serving: dict[str, object]) -> list[Verdict]:
    """From the JSON of the end-to-end part (`server/bench/gpu_serving.py`): figures by shape, then by load."""
    return [
        at_least(
            "8B, one stream: weight-bandwidth floor / step", _served(serving, "8B", 1, "floor_fraction"), 0.75, 0.75
        ),
        at_most(
            "0.6B, 32 streams: share of the step without the device", _served(serving, "0.6B", 32, "gap"), 0.05, 0.05
        ),
    ]


def _served(serving: dict[str, object], shape: str, streams: int, figure: str) -> list[tuple[str, float | None]]:
    shapes = serving.get("shapes")
    found = shapes.get(shape) if isinstance(shapes, dict) else None
    decode = found.get("decode") if isinstance(found, dict) else None
    return [
        (f"{shape} x {streams}", float(load[figure]) if isinstance(load.get(figure), int | float) else None)
        for load in (decode if isinstance(decode, list) else [])
        if isinstance(load, dict) and load.get("streams") == streams
    ]

"""Results as lines of text, one function for each part of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kernels.gpu_report.results import CaseResult, Report, Verdict

NO_FIGURE = "-"


def case_header(baselines: Sequence[str]) -> str:
    names = "".join(f"{name:>14}" for name in baselines)
    return (
        f"{'case':40}{'us':>10}{'spread':>8}{'GB/s':>7}{'TFLOP/s':>8}{'/copy':>7}{'/floor':>7}{'/parts':>7}"
        f"{'plan us':>8}{'merge':>6}  | their time / ours{names}"
    )


def case_lines(case: CaseResult, told: set[tuple[str, str]]) -> Iterator[str]:
    """The case's row, then why figures are missing. told: (baseline, reason) that the reader knows; it grows."""
    if case.reason is not None:
        yield f"{case.case:40}{case.reason}"
        return
    ratios = "".join(f"{_number(found.ratio, '.2f') + _mark(found.is_graph):>14}" for found in case.baselines)
    yield (
        f"{case.case:40}{_number(case.us, '.1f') + _mark(case.is_graph):>10}{_number(case.spread, '.1%'):>8}"
        f"{_number(case.gb_s, '.0f'):>7}{_number(case.tflop_s, '.1f'):>8}{_number(case.copy_fraction, '.2f'):>7}"
        f"{_number(case.floor_fraction, '.2f'):>7}{_number(case.parts_ratio, '.2f'):>7}"
        f"{_number(case.plan_us, '.0f'):>8}{_number(case.combine_share, '.0%'):>6}  |{'':19}{ratios}"
    )
    by_reason: dict[str, list[str]] = {}
    for found in case.baselines:
        if found.reason is not None and (found.name, found.reason) not in told:
            told.add((found.name, found.reason))
            by_reason.setdefault(found.reason, []).append(found.name)
    for reason, names in by_reason.items():
        yield f"    {', '.join(names)}: {reason}"


def sparse_header() -> str:
    return f"{'sparse attention':58}{'us':>10}{'spread':>8}{'/copy':>7}{'/floor':>7}{'dense / ours':>14}{'noise':>8}"


def sparse_line(case: CaseResult) -> str:
    if case.reason is not None:
        return f"{case.case:58}{case.reason}"
    [dense] = case.baselines
    ratio = _number(dense.ratio, ".2f") + _mark(dense.is_graph)
    why = "" if dense.reason is None else f"  dense: {dense.reason}"
    return (
        f"{case.case:58}{_number(case.us, '.1f') + _mark(case.is_graph):>10}{_number(case.spread, '.1%'):>8}"
        f"{_number(case.copy_fraction, '.2f'):>7}{_number(case.floor_fraction, '.2f'):>7}{ratio:>14}"
        f"{_number(case.noise, '.1%'):>8}{why}"
    )


def _number(value: float | None, form: str) -> str:
    return NO_FIGURE if value is None else format(value, form)


def _mark(is_graph: bool | None) -> str:
    """Without a graph the host's launches are in the time."""
    return "*" if is_graph is False else ""


def verdict_line(verdict: Verdict) -> str:
    sign = ">=" if verdict.is_at_least else "<="
    figure = _number(verdict.figure, ".3g")
    bounds = f"{sign} {verdict.limit:g}" + (f" (goal {verdict.goal:g})" if verdict.goal != verdict.limit else "")
    return f"{verdict.outcome.upper():13}{verdict.name:56}{figure:>8}  {bounds:24}{verdict.detail}"


def serving_lines(serving: Mapping[str, object]) -> Iterator[str]:
    """Rows of the end-to-end part's JSON; what it could not do stands in its own words."""
    shapes = serving.get("shapes")
    for shape, found in (shapes if isinstance(shapes, dict) else {}).items():
        for kind in ("decode", "prefill", "mixed"):
            for load in found.get(kind, ()):
                figures = ", ".join(f"{name} {_plain(value)}" for name, value in load.items() if value is not None)
                yield f"{shape} {kind}: {figures}"
        for note in found.get("notes", ()):
            yield f"{shape}: {note}"
    for note in _strings(serving.get("notes")):
        yield note


def _plain(value: object) -> str:
    return format(value, ".4g") if isinstance(value, float) else str(value)


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def left_out_lines(report: Report) -> Iterator[str]:
    for section, items in report.left_out.items():
        if items:
            yield f"left out of {section} ({len(items)}): {', '.join(items)}"

"""From samples to figures: percentiles, throughput and goodput; as a table for people and JSON for programs.

Times between tokens are pooled over all requests (a per-request mean hides stalls). Failed requests count as errors by
status and nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.client import Sample


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution | None:
        if not seconds:
            return None
        ordered = sorted(seconds)
        mean = math.fsum(ordered) / len(ordered)
        values = (mean, percentile(ordered, 50), percentile(ordered, 90), percentile(ordered, 99), ordered[-1])
        return cls(*(1e3 * value for value in values))


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds; None = no limit. A request is good if its first token came within `ttft_ms` and the 99th
    percentile of its own gaps is within `tbt_ms`."""

    ttft_ms: float | None = None
    tbt_ms: float | None = None

    def holds(self, sample: Sample) -> bool:
        if self.ttft_ms is not None and 1e3 * sample.ttft > self.ttft_ms:
            return False
        gaps = sorted(sample.gaps)
        return self.tbt_ms is None or not gaps or 1e3 * percentile(gaps, 99) <= self.tbt_ms


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run. `goodput` is completed requests per second that met the SLO, None without one.

    is_counted   token counts are the server's own; otherwise events were counted, a lower bound
    tokens_per_event   above 1 the server merges tokens, and times between tokens are times between events
    """

    requests: int
    completed: int
    errors: dict[str, int]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    tokens_per_event: float
    is_counted: bool
    ttft_ms: Distribution | None
    tbt_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    slo: Slo
    goodput_per_s: float | None
    good_share: float | None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of a sorted, non-empty sequence, linearly interpolated between the two nearest ranks."""
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarise(samples: Sequence[Sample], slo: Slo) -> Report:
    """Raises ValueError for no samples: there is nothing to say."""
    if not samples:
        raise ValueError("no request was sent")
    done = [sample for sample in samples if sample.is_complete]
    duration = max(max(s.finished for s in samples) - min(s.sent for s in samples), 1e-9)
    output_tokens = sum(sample.output_tokens for sample in done)
    num_events = sum(len(sample.event_times) for sample in done)
    has_slo = slo.ttft_ms is not None or slo.tbt_ms is not None
    num_good = sum(1 for sample in done if slo.holds(sample))
    return Report(
        requests=len(samples),
        completed=len(done),
        errors=errors_by_status(samples),
        duration_s=duration,
        prompt_tokens=sum(sample.prompt_tokens for sample in done),
        output_tokens=output_tokens,
        requests_per_s=len(done) / duration,
        prompt_tokens_per_s=sum(sample.prompt_tokens for sample in done) / duration,
        output_tokens_per_s=output_tokens / duration,
        tokens_per_event=output_tokens / num_events if num_events else 0.0,
        is_counted=all(sample.is_counted for sample in done),
        ttft_ms=Distribution.of([sample.ttft for sample in done]),
        tbt_ms=Distribution.of([gap for sample in done for gap in sample.gaps]),
        tpot_ms=Distribution.of([sample.tpot for sample in done if sample.tpot is not None]),
        e2e_ms=Distribution.of([sample.finished - sample.sent for sample in done]),
        slo=slo,
        goodput_per_s=num_good / duration if has_slo else None,
        good_share=num_good / len(samples) if has_slo else None,
    )


def errors_by_status(samples: Sequence[Sample]) -> dict[str, int]:
    """`429`, `500`, ... for refusals, `200 broken stream` for answers that failed midway, `no answer` for the rest."""
    names = {0: "no answer", 200: "200 broken stream"}
    failed = (sample for sample in samples if not sample.is_complete)
    return dict(sorted(Counter(names.get(sample.status, str(sample.status)) for sample in failed).items()))


def first_errors(samples: Sequence[Sample], count: int = 3) -> list[str]:
    """The first few different error messages, as the server said them."""
    messages = dict.fromkeys(s.error or "the answer held no token" for s in samples if not s.is_complete)
    return list(messages)[:count]


def as_json(report: Report, settings: dict[str, Any]) -> str:
    return json.dumps({"settings": settings, "report": dataclasses.asdict(report)}, indent=2) + "\n"


def write_json(path: Path, report: Report, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(report, settings))


def as_table(report: Report) -> str:
    lines = [
        f"{'requests':<22}{report.completed} of {report.requests} completed in {report.duration_s:.2f} s",
        f"{'errors':<22}{', '.join(f'{k}: {v}' for k, v in report.errors.items()) or 'none'}",
        f"{'requests/s':<22}{report.requests_per_s:.2f}",
        f"{'output tokens/s':<22}{report.output_tokens_per_s:.1f}{'' if report.is_counted else '  (events counted)'}",
        f"{'prompt tokens/s':<22}{report.prompt_tokens_per_s:.1f}",
    ]
    if report.tokens_per_event > 1.005:
        lines.append(f"{'tokens per event':<22}{report.tokens_per_event:.2f}")
    if report.goodput_per_s is not None and report.good_share is not None:
        limits = [f"TTFT <= {report.slo.ttft_ms:g} ms"] if report.slo.ttft_ms is not None else []
        limits += [f"TBT <= {report.slo.tbt_ms:g} ms"] if report.slo.tbt_ms is not None else []
        lines.append(
            f"{'goodput, requests/s':<22}{report.goodput_per_s:.2f} "
            f"({report.good_share:.0%} of all sent; {' and '.join(limits)})"
        )
    lines += ["", f"{'ms':<22}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    rows = (
        ("time to first token", report.ttft_ms),
        ("time between tokens", report.tbt_ms),
        ("time per output token", report.tpot_ms),
        ("whole request", report.e2e_ms),
    )
    for name, values in rows:
        if values is not None:
            lines.append(f"{name:<22}" + "".join(f"{value:>10.1f}" for value in dataclasses.astuple(values)))
    return "\n".join(lines)

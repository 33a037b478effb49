import json

import pytest

from server.bench.client import Sample
from server.bench.report import Distribution, Slo, as_json, as_table, errors_by_status, percentile, summarise


def sample(sent: float, times: list[float], tokens: int | None = None, status: int = 200) -> Sample:
    return Sample(
        sent=sent,
        status=status,
        event_times=times,
        finished=times[-1] if times else sent,
        prompt_tokens=10,
        output_tokens=len(times) if tokens is None else tokens,
        is_counted=True,
        error=None if status == 200 else "no",
    )


def test_percentiles_are_interpolated_between_ranks() -> None:
    values = [float(v) for v in range(1, 101)]
    assert percentile(values, 50) == pytest.approx(50.5)
    assert percentile(values, 99) == pytest.approx(99.01)
    assert percentile([3.0], 99) == 3.0
    assert percentile(values, 100) == 100.0


def test_a_run_is_summed_up_with_pooled_gaps() -> None:
    report = summarise([sample(0.0, [0.1, 0.2, 0.3]), sample(0.0, [0.5, 1.5, 2.0])], Slo())
    assert report.completed == 2
    assert report.duration_s == pytest.approx(2.0)
    assert report.output_tokens_per_s == pytest.approx(3.0)
    assert report.requests_per_s == pytest.approx(1.0)
    assert report.ttft_ms is not None
    assert report.ttft_ms.p50 == pytest.approx(300.0)
    assert report.tbt_ms is not None
    assert report.tbt_ms.max == pytest.approx(1000.0), "one stall shows in the maximum"
    assert report.tbt_ms.p50 == pytest.approx(300.0), "gaps 100, 100, 500, 1000"
    assert report.tpot_ms is not None
    assert report.tpot_ms.max == pytest.approx(750.0)
    assert report.goodput_per_s is None


def test_goodput_counts_only_requests_inside_both_limits() -> None:
    samples = [sample(0.0, [0.1, 0.2]), sample(0.0, [0.9, 1.0]), sample(0.0, [0.1, 0.9]), sample(0.0, [], status=429)]
    report = summarise(samples, Slo(ttft_ms=500, tbt_ms=300))
    assert report.good_share == 0.25
    assert report.goodput_per_s == pytest.approx(1 / report.duration_s)
    assert "goodput" in as_table(report)


def test_failures_are_counted_by_status_and_change_no_latency() -> None:
    broken = sample(0.0, [0.1])
    broken.error = "cut"
    samples = [sample(0.0, [0.1, 0.2]), sample(0.0, [], status=429), sample(0.0, [], status=429), broken]
    samples.append(sample(0.0, [], status=0))
    report = summarise(samples, Slo())
    assert errors_by_status(samples) == {"200 broken stream": 1, "429": 2, "no answer": 1}
    assert report.completed == 1
    assert report.output_tokens == 2
    assert report.ttft_ms == Distribution.of([0.1])


def test_the_json_report_holds_what_the_table_shows() -> None:
    report = summarise([sample(0.0, [0.1, 0.2], tokens=4)], Slo(ttft_ms=200))
    content = json.loads(as_json(report, {"rate": 2}))
    assert content["settings"] == {"rate": 2}
    assert content["report"]["output_tokens"] == 4
    assert content["report"]["tokens_per_event"] == 2.0
    table = as_table(report)
    assert "tokens per event" in table
    assert f"{content['report']['ttft_ms']['p99']:.1f}" in table


def test_no_sample_is_an_error_and_no_report_of_zeros() -> None:
    with pytest.raises(ValueError, match="no request was sent"):
        summarise([], Slo())

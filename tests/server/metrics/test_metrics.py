"""What a scrape shows after a step and a request."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from scheduler.types import DraftTally, FinishReason, RequestTimes, StepStats
from server.metrics import FinishedRequest, Metrics, length_buckets, names


def test_names_that_dashboards_know_are_there() -> None:
    metrics = Metrics("m", 4096)
    metrics.observe_step(
        StepStats(step=1, elapsed_s=0.004, decode_tokens=3, num_running=3, pages_used=1, pages_total=4)
    )
    shown = set(names(metrics.registry))
    wanted = {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:iteration_tokens_total_bucket",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "braid_step_duration_seconds_bucket",
        "braid_step_tokens_total",
        "braid_event_loop_lag_seconds_bucket",
        "braid_oldest_waiting_seconds",
    }
    assert wanted <= shown
    assert metrics.registry.get_sample_value("vllm:kv_cache_usage_perc", {"model_name": "m"}) == 0.25


def test_a_step_and_a_request_are_counted_once() -> None:
    metrics = Metrics("m")
    metrics.observe_step(
        StepStats(
            generated_tokens=5,
            prefill_tokens=7,
            prefix_queries=9,
            prefix_hits=4,
            num_compiled=2,
            is_ahead=True,
            num_surplus=3,
        )
    )
    times = RequestTimes(0.1, 0.2, 0.3)
    metrics.observe_finished(FinishedRequest(FinishReason.LENGTH, 3, 5, 5, 0.9, 0.1, 0.5, times))
    value = metrics.registry.get_sample_value
    assert value("vllm:generation_tokens_total", {"model_name": "m"}) == 5
    assert value("vllm:prefix_cache_hits_total", {"model_name": "m"}) == 4
    assert value("braid_kernel_compilations_total", {"model_name": "m"}) == 2
    assert value("braid_steps_ahead_total", {"model_name": "m"}) == 1
    assert value("braid_surplus_tokens_total", {"model_name": "m"}) == 3
    assert value("vllm:request_success_total", {"model_name": "m", "finished_reason": "length"}) == 1
    assert value("vllm:request_time_per_output_token_seconds_sum", {"model_name": "m"}) == 0.1
    assert metrics.totals.generated == 5


def drafting_step(**fields: float) -> StepStats:
    """Four sequences decode; three of them verify 2 + 2 + 1 drafts, of which 3 are accepted."""
    tallies = (
        DraftTally("suffix", 1, 2, 2, 2),
        DraftTally("suffix", 2, 2, 1, 2),
        DraftTally("draft_model", 1, 1, 0, 1),
    )
    return StepStats(
        elapsed_s=0.01,
        decode_tokens=4,
        draft_tokens=5,
        accepted_tokens=3,
        drafted_seqs=3,
        generated_tokens=7,
        draft_s=0.002,
        drafts=tallies,
        goodput_predicted=600.0,
        **fields,  # type: ignore[arg-type]
    )


def test_drafts_are_counted_by_drafter_and_position() -> None:
    metrics = Metrics("m", drafters=("suffix", "draft_model"), max_drafts=4)
    for _ in range(3):
        metrics.observe_step(drafting_step())

    def value(name: str, **labels: str) -> float:
        return float(metrics.registry.get_sample_value(name, {"model_name": "m", **labels}) or 0)

    assert value("vllm:spec_decode_num_drafts_total") == 9
    assert value("vllm:spec_decode_num_draft_tokens_total") == 15
    assert value("vllm:spec_decode_num_accepted_tokens_total") == 9
    per_position = [
        value("vllm:spec_decode_num_accepted_tokens_per_pos_total", position=str(position)) for position in range(4)
    ]
    assert per_position == [6, 3, 0, 0]
    assert value("braid_spec_draft_tokens_total", drafter="suffix") == 12
    assert value("braid_spec_accepted_tokens_total", drafter="draft_model") == 0
    assert value("braid_spec_reached_per_pos_total", drafter="suffix", position="2") == 6
    assert value("braid_spec_accepted_per_pos_total", drafter="suffix", position="2") == 3
    assert value("braid_spec_draft_seconds_total") == pytest.approx(0.006)
    assert value("braid_spec_al") == pytest.approx(2.0)
    assert value("braid_spec_k_avg") == pytest.approx(1.25)
    assert value("braid_spec_waste_ratio") == pytest.approx(0.4)
    assert value("braid_goodput_predicted") == pytest.approx(600)
    assert value("braid_goodput_observed") == pytest.approx(700)
    assert (metrics.totals.drafted, metrics.totals.accepted) == (15, 9)


def test_drafters_and_positions_beyond_the_closed_sets_make_no_new_series() -> None:
    metrics = Metrics("m", drafters=("suffix",), max_drafts=2)
    before = len(list(series(metrics)))
    odd = (DraftTally("nobody", 1, 1, 1, 1), DraftTally("suffix", 9, 1, 1, 1))
    metrics.observe_step(StepStats(decode_tokens=1, draft_tokens=2, accepted_tokens=2, drafted_seqs=1, drafts=odd))
    assert len(list(series(metrics))) == before
    labels = {"model_name": "m", "drafter": "other"}
    assert metrics.registry.get_sample_value("braid_spec_accepted_tokens_total", labels) == 1


def series(metrics: Metrics) -> Iterator[tuple[str, str]]:
    for family in metrics.registry.collect():
        for sample in family.samples:
            yield sample.name, str(sample.labels)


def test_tokens_that_arrive_together_are_one_arrival() -> None:
    metrics = Metrics("m")
    metrics.observe_gap(0.03, 3)
    metrics.observe_gap(0.02, 1)
    value = metrics.registry.get_sample_value
    assert value("vllm:inter_token_latency_seconds_count", {"model_name": "m"}) == 2
    assert value("vllm:inter_token_latency_seconds_sum", {"model_name": "m"}) == pytest.approx(0.05)
    assert value("braid_tokens_per_arrival_sum", {"model_name": "m"}) == 4
    assert value("braid_time_per_token_seconds_count", {"model_name": "m"}) == 4
    assert value("braid_time_per_token_seconds_sum", {"model_name": "m"}) == pytest.approx(0.05)


def test_requests_without_drafts_are_counted_by_who_wanted_none() -> None:
    metrics = Metrics("m")
    metrics.count_undrafted("request")
    labels = {"model_name": "m", "reason": "request"}
    assert metrics.registry.get_sample_value("braid_spec_disabled_total", labels) == 1


def test_labels_outside_the_closed_sets_become_other() -> None:
    metrics = Metrics("m")
    metrics.observe_http("/evil\n", "BREW", 404, 0.1)
    labels = {"handler": "other", "method": "other", "status": "404"}
    assert metrics.registry.get_sample_value("http_requests_total", labels) == 1


def test_length_buckets_reach_the_context() -> None:
    assert length_buckets(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert length_buckets(8192)[-1] == 10000


def test_a_step_is_cheap_to_observe() -> None:
    metrics = Metrics("m")
    stats = StepStats(elapsed_s=0.01, predicted_s=0.01, decode_tokens=32, generated_tokens=32, pages_total=9)
    before = time.process_time()
    for _ in range(1000):
        metrics.observe_step(stats)
    assert (time.process_time() - before) / 1000 < 0.0005

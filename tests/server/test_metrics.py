"""What a scrape shows after a step and a request."""

from __future__ import annotations

import time

from scheduler.types import FinishReason, RequestTimes, StepStats
from server.metrics import FinishedRequest, Metrics, length_buckets, names


def test_names_that_dashboards_know_are_there() -> None:
    metrics = Metrics("m", 4096)
    metrics.observe_step(
        StepStats(step=1, elapsed_s=0.004, decode_tokens=3, num_running=3, pages_used=1, pages_total=4)
    )
    shown = set(names(metrics))
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
    metrics.observe_step(StepStats(generated_tokens=5, prefill_tokens=7, prefix_queries=9, prefix_hits=4))
    times = RequestTimes(0.1, 0.2, 0.3)
    metrics.observe_finished(FinishedRequest(FinishReason.LENGTH, 3, 5, 5, 0.9, 0.1, 0.5, times))
    value = metrics.registry.get_sample_value
    assert value("vllm:generation_tokens_total", {"model_name": "m"}) == 5
    assert value("vllm:prefix_cache_hits_total", {"model_name": "m"}) == 4
    assert value("vllm:request_success_total", {"model_name": "m", "finished_reason": "length"}) == 1
    assert value("vllm:request_time_per_output_token_seconds_sum", {"model_name": "m"}) == 0.1
    assert metrics.totals.generated == 5


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

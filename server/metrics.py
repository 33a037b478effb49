"""Prometheus metrics of one server, from deltas and `StepStats` alone, on the HTTP side.

Names and buckets of vLLM where they mean the same, `braid_*` for the rest. Every label comes from a closed set and
every child is resolved at start: a step costs a few dozen additions, a token one. Nothing a client sends becomes a
label (S-81).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

from scheduler.types import FinishReason, RequestTimes, StepStats

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 640, 2560),
)
ITL_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

HANDLERS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model:path}", "/tokenize", "/detokenize"),
    *("/health", "/health/live", "/health/generate", "/ping", "/version", "/metrics", "/openapi.json", "other"),
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "other")
REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens", "unavailable", "text_queue")
ABORT_CAUSES = ("client", "timeout", "slow_reader", "shutdown")
ABORT_STAGES = ("waiting", "running")
TOKEN_KINDS = ("decode", "prefill", "draft", "denoise")


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request's end, in numbers."""

    reason: FinishReason
    num_prompt: int
    num_generated: int
    max_tokens: int
    e2e_s: float
    first_token_s: float | None
    last_token_s: float | None
    times: RequestTimes | None


@dataclass(slots=True)
class StepTotals:
    """Sums over all steps, for the status line."""

    generated: int = 0
    prefilled: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


def length_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to and including the first that is >= most."""
    buckets: list[int] = []
    scale = 1
    while not buckets or buckets[-1] < most:
        buckets += [scale, 2 * scale, 5 * scale]
        scale *= 10
    while len(buckets) > 1 and buckets[-2] >= most:
        buckets.pop()
    return tuple(buckets)


class Metrics:
    """All metrics, in a registry of their own (several servers can live in one process, as tests do)."""

    def __init__(self, model_name: str, model_len: int = 8192) -> None:
        disable_created_metrics()  # a timestamp per series would double the scrape
        self.registry = CollectorRegistry()
        self._model = model_name
        self._model_len = model_len
        self.totals = StepTotals()
        ProcessCollector(registry=self.registry)
        self._make_gauges()
        self._make_step_metrics()
        self._make_request_metrics()
        self._make_http_metrics()

    def _make_gauges(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Sequences running")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1")
        self._pages = {
            state: self._gauge("braid_kv_pages", "KV pages by state", state=state)
            for state in ("used", "cached", "free", "total")
        }
        self._oldest = self._gauge("braid_oldest_waiting_seconds", "Age of the oldest waiting request")
        self._budget = self._gauge("braid_step_token_budget", "Token budget of the last step")
        self._predicted = self._gauge("braid_step_predicted_seconds", "Forecast of the last step's time")
        self._up = self._gauge("braid_engine_ready", "1 when the engine serves, else 0")
        self._restarts = self._gauge("braid_engine_restarts", "Engine restarts since the server started")
        self._held = self._gauge("braid_admission_requests", "Admission permits in use")

    def _make_step_metrics(self) -> None:
        self._iteration = self._histogram("vllm:iteration_tokens_total", "Tokens per step", ITERATION_BUCKETS)
        self._step_s = self._histogram("braid_step_duration_seconds", "Step time, observed", STEP_BUCKETS)
        self._step_error = self._histogram(
            "braid_step_prediction_error_seconds", "Absolute error of the step-time forecast", STEP_BUCKETS
        )
        self._tokens = {
            kind: self._counter("braid_step_tokens", "Query tokens processed, by kind", kind=kind)
            for kind in TOKEN_KINDS
        }
        self._steps = self._counter("braid_steps", "Steps run")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated")
        self._prefilled = self._counter("vllm:prompt_tokens", "Prompt tokens of admitted requests")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._preemptions = self._counter("vllm:num_preemptions", "Preempted sequences")
        self._recomputed = self._counter("vllm:prompt_tokens_recomputed", "Tokens computed again after a preemption")

    def _make_request_metrics(self) -> None:
        lengths = length_buckets(self._model_len)
        self._success = {
            reason: self._counter("vllm:request_success", "Finished requests", finished_reason=reason.value)
            for reason in FinishReason
        }
        self._prompt_len = self._histogram("vllm:request_prompt_tokens", "Prompt length", lengths)
        self._output_len = self._histogram("vllm:request_generation_tokens", "Output length", lengths)
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens asked for", lengths)
        self._n = self._histogram("vllm:request_params_n", "n asked for", (1, 2, 5, 10, 20))
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Time to first token", TTFT_BUCKETS)
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "Time between tokens", ITL_BUCKETS)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token of a request", ITL_BUCKETS
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Whole request", REQUEST_BUCKETS)
        self._queue_s = self._histogram("vllm:request_queue_time_seconds", "Time waiting", REQUEST_BUCKETS)
        self._prefill_s = self._histogram("vllm:request_prefill_time_seconds", "Time in prefill", REQUEST_BUCKETS)
        self._decode_s = self._histogram("vllm:request_decode_time_seconds", "Time in decode", REQUEST_BUCKETS)
        self._inference_s = self._histogram(
            "vllm:request_inference_time_seconds", "Prefill and decode", REQUEST_BUCKETS
        )

    def _make_http_metrics(self) -> None:
        self._rejected = {
            reason: self._counter("vllm:admission_rejections", "Requests refused for load", reason=reason)
            for reason in REJECTIONS
        }
        self._aborted = {
            (stage, cause): self._counter("braid_aborts", "Requests given up", stage=stage, cause=cause)
            for stage in ABORT_STAGES
            for cause in ABORT_CAUSES
        }
        self._auth_failures = self._counter("braid_auth_failures", "Requests without a valid key")
        self._lag = self._histogram("braid_event_loop_lag_seconds", "How late the event loop runs", LAG_BUCKETS)
        # These two carry no model label: that is how the instrumentators that dashboards know write them.
        self._http = Counter("http_requests", "HTTP requests", ["handler", "method", "status"], registry=self.registry)
        self._http_s = Histogram(
            "http_request_duration_seconds",
            "HTTP request time",
            ["handler"],
            registry=self.registry,
            buckets=TTFT_BUCKETS,
        )

    def _gauge(self, name: str, text: str, **labels: str) -> Gauge:
        return self._child(Gauge, name, text, labels)

    def _counter(self, name: str, text: str, **labels: str) -> Counter:
        return self._child(Counter, name, text, labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        parent = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
        return parent.labels(model_name=self._model)

    def _child(self, kind: type, name: str, text: str, labels: dict[str, str]):  # type: ignore[no-untyped-def]
        known = self.__dict__.setdefault("_parents", {})
        if name not in known:
            known[name] = kind(name, text, ["model_name", *labels], registry=self.registry)
        return known[name].labels(model_name=self._model, **labels)

    def observe_step(self, stats: StepStats) -> None:
        """One engine step; called for every step, so it only adds numbers."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        total = stats.pages_total
        self._kv_usage.set(stats.pages_used / total if total else 0.0)
        self._pages["used"].set(stats.pages_used)
        self._pages["cached"].set(stats.pages_cached)
        self._pages["free"].set(total - stats.pages_used - stats.pages_cached)
        self._pages["total"].set(total)
        self._oldest.set(stats.oldest_waiting_s)
        self._budget.set(stats.budget)
        self._predicted.set(stats.predicted_s)
        self._steps.inc()
        self._step_s.observe(stats.elapsed_s)
        if stats.predicted_s:
            self._step_error.observe(abs(stats.predicted_s - stats.elapsed_s))
        by_kind = (stats.decode_tokens, stats.prefill_tokens, stats.draft_tokens, stats.denoise_tokens)
        self._iteration.observe(sum(by_kind))
        for kind, count in zip(TOKEN_KINDS, by_kind, strict=True):
            if count:
                self._tokens[kind].inc(count)
        self._generated.inc(stats.generated_tokens)
        self.totals.generated += stats.generated_tokens
        self.totals.prefilled += stats.prefill_tokens
        self.totals.prefix_queries += stats.prefix_queries
        self.totals.prefix_hits += stats.prefix_hits
        for counter, count in (
            (self._queries, stats.prefix_queries),
            (self._hits, stats.prefix_hits),
            (self._preemptions, stats.num_preempted),
            (self._recomputed, stats.recomputed_tokens),
        ):
            if count:
                counter.inc(count)

    def observe_engine(self, is_ready: bool, restarts: int) -> None:
        self._up.set(1 if is_ready else 0)
        self._restarts.set(restarts)

    def observe_admitted(self, num_prompt: int, n: int, held: int) -> None:
        self._prefilled.inc(num_prompt)
        self._n.observe(n)
        self._held.set(held)

    def observe_held(self, held: int) -> None:
        self._held.set(held)

    def observe_first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def observe_gap(self, seconds: float) -> None:
        """Time since the same request's previous tokens."""
        self._itl.observe(seconds)

    def observe_finished(self, done: FinishedRequest) -> None:
        self._success[done.reason].inc()
        self._prompt_len.observe(done.num_prompt)
        self._output_len.observe(done.num_generated)
        self._max_tokens.observe(done.max_tokens)
        self._e2e.observe(done.e2e_s)
        if done.first_token_s is not None and done.last_token_s is not None and done.num_generated > 1:
            self._tpot.observe((done.last_token_s - done.first_token_s) / (done.num_generated - 1))
        if done.times is not None:
            self._queue_s.observe(done.times.queue_s)
            self._prefill_s.observe(done.times.prefill_s)
            self._decode_s.observe(done.times.decode_s)
            self._inference_s.observe(done.times.prefill_s + done.times.decode_s)

    def count_rejection(self, reason: str) -> None:
        self._rejected[reason].inc()

    def count_abort(self, stage: str, cause: str) -> None:
        self._aborted[stage, cause].inc()

    def count_auth_failure(self) -> None:
        self._auth_failures.inc()

    def observe_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """`handler` is a route template; what is not in the closed sets is counted as `other`."""
        handler = handler if handler in HANDLERS else "other"
        method = method if method in METHODS else "other"
        self._http.labels(handler=handler, method=method, status=str(status)).inc()
        self._http_s.labels(handler=handler).observe(seconds)

    def render(self) -> bytes:
        text: bytes = generate_latest(self.registry)
        return text


def names(metrics: Metrics) -> Iterable[str]:
    """Every sample name a scrape shows now."""
    return sorted({sample.name for family in metrics.registry.collect() for sample in family.samples})

"""Metrics: what requests and HTTP add, and the registry that holds everything.

Names and buckets of vLLM where they mean the same, `braid_*` for the rest. Every label comes from a closed set and
every child is resolved at start: a step costs a few dozen additions, a token two. Nothing a client sends becomes a
label (S-81).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

from scheduler.types import (
    Attention,
    AttentionMethod,
    DecodingUsage,
    FinishReason,
    PromptAttention,
    PromptMethod,
    RequestTimes,
    StepStats,
)
from server.metrics.denoising import DenoisingMetrics
from server.metrics.families import Families
from server.metrics.speculation import SpeculationMetrics
from server.metrics.steps import StepMetrics, StepTotals

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 640, 2560),
)
ITL_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

ARRIVAL_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)

HANDLERS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model:path}", "/v1/denoise/stream"),
    *("/tokenize", "/detokenize"),
    *("/health", "/health/live", "/health/generate", "/ping", "/version", "/metrics", "/openapi.json", "other"),
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "other")
REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens", "max_logprob_entries", "unavailable", "text_queue")
ABORT_CAUSES = ("client", "timeout", "slow_reader", "shutdown")
ABORT_STAGES = ("waiting", "running")


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
    decoding: DecodingUsage | None = None


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
    """All metrics, in a registry of their own (several servers can live in one process, as tests do).

    drafters, max_drafts   of the engine, for the labels of its drafts
    beside   of another model of the same server: its registry, and its metrics of HTTP, are these
    """

    _make: Families
    _auth_failures: Counter
    _lag: Histogram
    _http: Counter
    _http_s: Histogram

    def __init__(
        self,
        model_name: str,
        model_len: int = 8192,
        drafters: Sequence[str] = (),
        max_drafts: int = 8,
        beside: Metrics | None = None,
    ) -> None:
        disable_created_metrics()  # a timestamp per series would double the scrape
        if beside is None:
            self.registry = CollectorRegistry()
            ProcessCollector(registry=self.registry)
        else:
            self.registry = beside.registry
        self._make = Families(self.registry, model_name, None if beside is None else beside._make)
        make = self._make
        self._steps = StepMetrics(make)
        self._speculation = SpeculationMetrics(make, drafters, max_drafts)
        self._denoising = DenoisingMetrics(make)
        self._make_engine_metrics(make)
        self._make_request_metrics(make, length_buckets(model_len))
        self._make_latency_metrics(make)
        self._make_edge_metrics(make)
        if beside is None:
            self._make_http_metrics(make)
        else:
            self._auth_failures, self._lag = beside._auth_failures, beside._lag
            self._http, self._http_s = beside._http, beside._http_s

    @property
    def totals(self) -> StepTotals:
        """Sums over all steps."""
        return self._steps.totals

    def _make_engine_metrics(self, make: Families) -> None:
        self._up = make.gauge("braid_engine_ready", "1 when the engine serves, else 0")
        self._restarts = make.gauge("braid_engine_restarts", "Engine restarts since the server started")
        self._held = make.gauge("braid_admission_requests", "Admission permits in use")

    def _make_request_metrics(self, make: Families, lengths: Sequence[int]) -> None:
        self._prefilled = make.counter("vllm:prompt_tokens", "Prompt tokens of admitted requests")
        self._success = {
            reason: make.counter("vllm:request_success", "Finished requests", finished_reason=reason.value)
            for reason in FinishReason
        }
        self._prompt_len = make.histogram("vllm:request_prompt_tokens", "Prompt length", lengths)
        self._output_len = make.histogram("vllm:request_generation_tokens", "Output length", lengths)
        self._max_tokens = make.histogram("vllm:request_params_max_tokens", "max_tokens asked for", lengths)
        self._attention = {
            method: make.counter("braid_attention_requests", "Calls by how their answers attend", method=method)
            for method in ("dense", *AttentionMethod)
        }
        self._prompt_attention = {
            method: make.counter("braid_prompt_attention_requests", "Calls by how their prompts attend", method=method)
            for method in ("dense", *PromptMethod)
        }
        self._n = make.histogram("vllm:request_params_n", "n asked for", (1, 2, 5, 10, 20))

    def _make_latency_metrics(self, make: Families) -> None:
        self._ttft = make.histogram("vllm:time_to_first_token_seconds", "Time to first token", TTFT_BUCKETS)
        self._itl = make.histogram("vllm:inter_token_latency_seconds", "Time between tokens' arrivals", ITL_BUCKETS)
        self._per_token = make.histogram(
            "braid_time_per_token_seconds", "Time between arrivals shared by the tokens of one, per token", ITL_BUCKETS
        )
        self._arrival = make.histogram("braid_tokens_per_arrival", "Tokens that arrive together", ARRIVAL_BUCKETS)
        self._tpot = make.histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token of a request", ITL_BUCKETS
        )
        self._e2e = make.histogram("vllm:e2e_request_latency_seconds", "Whole request", REQUEST_BUCKETS)
        self._queue_s = make.histogram("vllm:request_queue_time_seconds", "Time waiting", REQUEST_BUCKETS)
        self._prefill_s = make.histogram("vllm:request_prefill_time_seconds", "Time in prefill", REQUEST_BUCKETS)
        self._decode_s = make.histogram("vllm:request_decode_time_seconds", "Time in decode", REQUEST_BUCKETS)
        self._inference_s = make.histogram("vllm:request_inference_time_seconds", "Prefill and decode", REQUEST_BUCKETS)

    def _make_edge_metrics(self, make: Families) -> None:
        self._rejected = {
            reason: make.counter("vllm:admission_rejections", "Requests refused for load", reason=reason)
            for reason in REJECTIONS
        }
        self._aborted = {
            (stage, cause): make.counter("braid_aborts", "Requests given up", stage=stage, cause=cause)
            for stage in ABORT_STAGES
            for cause in ABORT_CAUSES
        }

    def _make_http_metrics(self, make: Families) -> None:
        self._auth_failures = make.counter("braid_auth_failures", "Requests without a valid key")
        self._lag = make.histogram("braid_event_loop_lag_seconds", "How late the event loop runs", LAG_BUCKETS)
        # These two carry no model label: that is how the instrumentators that dashboards know write them.
        self._http = Counter("http_requests", "HTTP requests", ["handler", "method", "status"], registry=self.registry)
        self._http_s = Histogram(
            "http_request_duration_seconds",
            "HTTP request time",
            ["handler"],
            registry=self.registry,
            buckets=TTFT_BUCKETS,
        )

    def observe_step(self, stats: StepStats) -> None:
        """One engine step; called for every step, so it only adds numbers."""
        self._steps.observe(stats)
        self._speculation.observe(stats)

    def observe_engine(self, is_ready: bool, restarts: int) -> None:
        self._up.set(1 if is_ready else 0)
        self._restarts.set(restarts)

    def observe_admitted(
        self,
        num_prompt: int,
        n: int,
        held: int,
        attention: Attention | None,
        prompt_attention: PromptAttention | None,
    ) -> None:
        self._prefilled.inc(num_prompt)
        self._n.observe(n)
        self._attention["dense" if attention is None else attention.method].inc()
        self._prompt_attention["dense" if prompt_attention is None else prompt_attention.method].inc()
        self._held.set(held)

    def observe_held(self, held: int) -> None:
        self._held.set(held)

    def observe_first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def observe_gap(self, seconds: float, num_tokens: int) -> None:
        """Tokens of one request, and the time since its previous ones. Several at once arrived at once: the time
        between arrivals is one value, its share per token another metric."""
        self._itl.observe(seconds)
        self._arrival.observe(num_tokens)
        for _ in range(num_tokens):
            self._per_token.observe(seconds / num_tokens)

    def observe_denoised(self, usage: DecodingUsage | None, num_tokens: int) -> None:
        """News of a request that denoises: what it took since the last, and the tokens it gave."""
        self._denoising.observe(usage, num_tokens)

    def observe_finished(self, done: FinishedRequest) -> None:
        self._success[done.reason].inc()
        self._prompt_len.observe(done.num_prompt)
        self._output_len.observe(done.num_generated)
        self._max_tokens.observe(done.max_tokens)
        self._e2e.observe(done.e2e_s)
        if done.first_token_s is not None and done.last_token_s is not None and done.num_generated > 1:
            self._tpot.observe((done.last_token_s - done.first_token_s) / (done.num_generated - 1))
        if done.decoding is not None:
            self._denoising.observe_finished(done.decoding, done.num_generated)
        if done.times is not None:
            self._queue_s.observe(done.times.queue_s)
            self._prefill_s.observe(done.times.prefill_s)
            self._decode_s.observe(done.times.decode_s)
            self._inference_s.observe(done.times.prefill_s + done.times.decode_s)

    def count_rejection(self, reason: str) -> None:
        self._rejected[reason].inc()

    def count_abort(self, stage: str, cause: str) -> None:
        self._aborted[stage, cause].inc()

    def count_undrafted(self, reason: str) -> None:
        """A request that gets no drafts: `server` has no drafter, or the `request` said so."""
        self._speculation.count_undrafted(reason)

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

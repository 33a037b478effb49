"""What engine steps add to the metrics: a few dozen additions a step."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from scheduler.types import StepStats
from server.metrics.families import Families

STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKEN_KINDS = ("decode", "prefill", "draft", "denoise")


@dataclass(slots=True)
class StepTotals:
    """Sums over all steps, for the status line."""

    generated: int = 0
    prefilled: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafted: int = 0
    accepted: int = 0
    denoised: int = 0

    def __add__(self, other: StepTotals) -> StepTotals:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return StepTotals(*(mine + its for mine, its in pairs))


class StepMetrics:
    """Gauges and counters of the steps themselves; drafts have `speculation.py`."""

    def __init__(self, make: Families) -> None:
        self.totals = StepTotals()
        self._make_gauges(make)
        self._iteration = make.histogram("vllm:iteration_tokens_total", "Tokens per step", ITERATION_BUCKETS)
        self._step_s = make.histogram("braid_step_duration_seconds", "Step time, observed", STEP_BUCKETS)
        self._step_error = make.histogram(
            "braid_step_prediction_error_seconds", "Absolute error of the step-time forecast", STEP_BUCKETS
        )
        self._tokens = {
            kind: make.counter("braid_step_tokens", "Query tokens processed, by kind", kind=kind)
            for kind in TOKEN_KINDS
        }
        self._steps = make.counter("braid_steps", "Steps run")
        self._generated = make.counter("vllm:generation_tokens", "Tokens generated")
        self._queries = make.counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._hits = make.counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._preemptions = make.counter("vllm:num_preemptions", "Preempted sequences")
        self._recomputed = make.counter("vllm:prompt_tokens_recomputed", "Tokens computed again after a preemption")
        self._corrected = make.counter("braid_corrected_tokens", "Output tokens computed again, all keys read")
        self._ahead = make.counter("braid_steps_ahead", "Steps launched before the tokens of the one before were known")
        self._surplus = make.counter("braid_surplus_tokens", "Their rows of sequences that turned out to have ended")
        self._compiled = make.counter("braid_kernel_compilations", "Kernels compiled while serving: 0 is right")

    def _make_gauges(self, make: Families) -> None:
        self._running = make.gauge("vllm:num_requests_running", "Sequences running")
        self._waiting = make.gauge("vllm:num_requests_waiting", "Requests waiting")
        self._kv_usage = make.gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1")
        self._pages = {
            state: make.gauge("braid_kv_pages", "KV pages by state", state=state)
            for state in ("used", "cached", "free", "total")
        }
        self._oldest = make.gauge("braid_oldest_waiting_seconds", "Age of the oldest waiting request")
        self._budget = make.gauge("braid_step_token_budget", "Token budget of the last step")
        self._predicted = make.gauge("braid_step_predicted_seconds", "Forecast of the last step's time")

    def observe(self, stats: StepStats) -> None:
        """One engine step; called for every step, so it only adds numbers."""
        self._show_state(stats)
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
        for counter, count in (
            (self._queries, stats.prefix_queries),
            (self._hits, stats.prefix_hits),
            (self._preemptions, stats.num_preempted),
            (self._recomputed, stats.recomputed_tokens),
            (self._corrected, stats.corrected_tokens),
            (self._ahead, int(stats.is_ahead)),
            (self._surplus, stats.num_surplus),
            (self._compiled, stats.num_compiled),
        ):
            if count:
                counter.inc(count)
        totals = self.totals
        totals.generated += stats.generated_tokens
        totals.prefilled += stats.prefill_tokens
        totals.prefix_queries += stats.prefix_queries
        totals.prefix_hits += stats.prefix_hits
        totals.drafted += stats.draft_tokens
        totals.accepted += stats.accepted_tokens
        totals.denoised += stats.denoise_tokens

    def _show_state(self, stats: StepStats) -> None:
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

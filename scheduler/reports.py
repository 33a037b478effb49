"""What leaves the scheduler: the first and last delta of a request, and the numbers of a step."""

from __future__ import annotations

from scheduler.draft_plan import DraftPlan
from scheduler.sequence import Sequence
from scheduler.types import Delta, Fault, Outcome, RequestTimes, StepStats, TokenLogprob


def make_delta(
    seq: Sequence,
    now: float,
    tokens: tuple[int, ...] = (),
    outcome: Outcome | None = None,
    prompt_logprobs: tuple[TokenLogprob, ...] = (),
    fault: Fault | None = None,
) -> Delta:
    """A delta with all that the first (cached_tokens) and the last (finish reason, times) one carry."""
    is_first, seq.has_sent = not seq.has_sent, True
    return Delta(
        request_id=seq.request.id,
        tokens=tokens,
        logprobs=outcome.logprobs if outcome is not None else (),
        prompt_logprobs=prompt_logprobs,
        finish_reason=seq.finish_reason,
        stop_id=seq.stop_id,
        cached_tokens=seq.cached_tokens if is_first else None,
        times=None if seq.finish_reason is None else _times(seq, now),
        fault=fault,
    )


def _times(seq: Sequence, now: float) -> RequestTimes:
    admitted_s = now if seq.admitted_s is None else seq.admitted_s
    first_token_s = now if seq.first_token_s is None else seq.first_token_s
    return RequestTimes(
        queue_s=admitted_s - seq.arrival_s,
        prefill_s=first_token_s - admitted_s,
        decode_s=now - first_token_s,
        num_preemptions=seq.num_preemptions,
    )


def step_stats(gauges: StepStats, draft: DraftPlan, elapsed_s: float, predicted_s: float, generated: int) -> StepStats:
    """The gauges after a step, with the counts of the step itself."""
    return StepStats(
        step=gauges.step,
        elapsed_s=elapsed_s,
        predicted_s=predicted_s,
        budget=draft.budget,
        decode_tokens=draft.num_decodes,
        prefill_tokens=draft.num_prefill,
        generated_tokens=generated,
        num_running=gauges.num_running,
        num_waiting=gauges.num_waiting,
        num_preempted=draft.num_preempted,
        recomputed_tokens=draft.num_recomputed,
        prefix_queries=draft.prefix_queries,
        prefix_hits=draft.prefix_hits,
        pages_used=gauges.pages_used,
        pages_cached=gauges.pages_cached,
        pages_total=gauges.pages_total,
        oldest_waiting_s=gauges.oldest_waiting_s,
    )

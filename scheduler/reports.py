"""What leaves the scheduler: the first and last delta of a request, and the numbers of a step."""

from __future__ import annotations

from dataclasses import replace

from scheduler.budget import DraftReport
from scheduler.decoding.base import News
from scheduler.draft_plan import DraftPlan
from scheduler.sequence import Sequence
from scheduler.types import Delta, Fault, RequestTimes, StepResult, StepStats

_NO_NEWS = News()


def make_delta(seq: Sequence, now: float, news: News = _NO_NEWS, fault: Fault | None = None) -> Delta:
    """A delta with all that the first (cached_tokens) and the last (finish reason, times) one carry."""
    if seq.has_sent and seq.finish_reason is None and fault is None:
        tokens, logprobs, prompt_logprobs, speculation, decoding, snapshot = news
        if decoding is None:
            return Delta(seq.request.id, tokens, logprobs, prompt_logprobs, speculation=speculation)
        return Delta(seq.request.id, tokens, logprobs, decoding=decoding, snapshot=snapshot)
    is_first, seq.has_sent = not seq.has_sent, True
    return Delta(
        request_id=seq.request.id,
        tokens=news.tokens,
        logprobs=news.logprobs,
        prompt_logprobs=news.prompt_logprobs,
        finish_reason=seq.finish_reason,
        stop_id=seq.stop_id,
        cached_tokens=seq.cached_tokens if is_first else None,
        times=None if seq.finish_reason is None else _times(seq, now),
        fault=fault,
        speculation=news.speculation,
        decoding=news.decoding,
        snapshot=news.snapshot,
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


def step_stats(
    gauges: StepStats, draft: DraftPlan, result: StepResult, predicted_s: float, generated: int, report: DraftReport
) -> StepStats:
    """The gauges after a step, with the counts of the step itself."""
    return replace(
        gauges,
        step=result.step,
        elapsed_s=result.elapsed_s,
        predicted_s=predicted_s,
        budget=draft.budget,
        decode_tokens=draft.num_decodes,
        prefill_tokens=draft.num_prefill - draft.num_fused,
        denoise_tokens=draft.num_denoise + draft.num_fused,
        draft_tokens=draft.num_drafts,
        generated_tokens=generated,
        num_preempted=draft.num_preempted,
        recomputed_tokens=draft.num_recomputed,
        corrected_tokens=draft.num_corrected,
        prefix_queries=draft.prefix_queries,
        prefix_hits=draft.prefix_hits,
        accepted_tokens=report.num_accepted,
        drafted_seqs=len(draft.verified),
        draft_s=result.draft_s,
        drafts=tuple(report.tallies),
        goodput_predicted=draft.goodput,
        num_compiled=result.num_compiled,
    )

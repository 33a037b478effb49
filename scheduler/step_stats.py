"""A step in numbers. Part of the vocabulary: `scheduler.types` hands it on."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.speculation import DraftTally


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step in numbers, for metrics and the status line. Counts are of this step; gauges are as it ends.

    prefill_tokens    prompt rows computed; recomputed_tokens of these had been computed before a preemption, and
                      corrected_tokens are rows of output computed again because they had left keys out
    generated_tokens  output tokens in this step's deltas
    num_preempted     sequences that lost their pages in this step
    prefix_queries    tokens of the requests admitted for the first time that looked into the prefix cache
    prefix_hits       of these, tokens whose pages were found
    pages_used        pages owned by sequences; pages_cached are idle but hold a prefix; the rest of pages_total is
    free
    draft_tokens   drafts verified, of drafted_seqs sequences; accepted_tokens of these became output; draft_s seconds
                   spent on proposing
    drafts         the same per drafter and position
    goodput_predicted   tokens per second the planner expected of this step (0 = no planner, or nothing known yet)
    model          whose step it was, as `Request.model`; the gauges are of this model alone
    num_compiled   as in `StepResult`
    is_ahead       planned and launched before the tokens of the step before it were known
    num_surplus    its rows of sequences that the step before it turned out to end
    """

    step: int = 0
    elapsed_s: float = 0.0
    predicted_s: float = 0.0
    budget: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    draft_tokens: int = 0
    denoise_tokens: int = 0
    generated_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    recomputed_tokens: int = 0
    corrected_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_total: int = 0
    oldest_waiting_s: float = 0.0
    accepted_tokens: int = 0
    drafted_seqs: int = 0
    draft_s: float = 0.0
    drafts: tuple[DraftTally, ...] = ()
    goodput_predicted: float = 0.0
    model: str = ""
    num_compiled: int = 0
    is_ahead: bool = False
    num_surplus: int = 0

"""One token after the other: prefill chunks, then one token a step.

A sequence is prompt + output; a resubmitted or preempted one arrives with output, which is prefilled like a prompt
(R4).
"""

from __future__ import annotations

from scheduler.decoding.base import BadOutcome
from scheduler.sequence import Sequence
from scheduler.types import FinishReason, Outcome, Read, Span, TokenLogprob

_FIRST_ROW = (0,)
_SAMPLE = Read.SAMPLE


class Autoregressive:
    """Decoding state machine of an autoregressive request (protocol: decoding/base.py)."""

    __slots__ = ("_max_tokens", "_max_total", "_num_logprobs_due", "_num_logprobs_sent", "_seq", "_stop_ids")

    def __init__(self, seq: Sequence, max_model_len: int) -> None:
        request = seq.request
        self._seq = seq
        self._stop_ids = frozenset(request.stop_ids)
        self._max_tokens = request.max_tokens
        self._max_total = min(max_model_len, len(request.prompt) + request.max_tokens)
        # The first prompt token has no predecessor. With output, all prompt logprobs left before the engine restarted.
        wanted = request.sampling.prompt_logprobs is not None and not request.output
        self._num_logprobs_due = len(request.prompt) - 1 if wanted else 0
        self._num_logprobs_sent = 0

    @property
    def judges_prompt(self) -> bool:
        return self._num_logprobs_sent < self._num_logprobs_due

    def next_span(self, budget: int) -> Span:
        seq = self._seq
        start = seq.num_committed
        tokens = seq.tokens
        known = len(tokens)
        if seq.prefill_end <= start == known - 1:
            return Span(seq.seq_id, (tokens[start],), start, known, 1, _FIRST_ROW, _SAMPLE)
        end = min(known, start + budget)
        judged = self._judged_rows(start, end)
        read = Read.SAMPLE if judged else Read.NOTHING
        return Span(seq.seq_id, tuple(tokens[start:end]), start, end, 1, judged, read)

    def _judged_rows(self, start: int, end: int) -> tuple[int, ...]:
        """Rows that predict a prompt token somebody asked about, and the last token's row unless nothing is generated.

        After a preemption rows are judged again although some of their logprobs are out; `absorb` drops those.
        """
        judged: list[int] = []
        if self.judges_prompt:
            judged.extend(range(min(end, self._num_logprobs_due) - start))
        if self._samples_at(end) and (not judged or judged[-1] != end - 1 - start):
            judged.append(end - 1 - start)
        return tuple(judged)

    def _samples_at(self, end: int) -> bool:
        return end == len(self._seq.tokens) and self._max_tokens > 0

    def absorb(self, span: Span, outcome: Outcome) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        seq = self._seq
        end = span.kv_len
        expected = 1 if self._samples_at(end) else 0
        if len(outcome.tokens) != expected:
            raise BadOutcome(f"the worker returned {len(outcome.tokens)} tokens where {expected} was due")
        if self.judges_prompt:
            prompt_logprobs = self._new_prompt_logprobs(span, outcome)
        else:
            prompt_logprobs = ()
        seq.num_committed = end
        if expected:
            self._append(outcome.tokens[0])
        elif end == len(seq.tokens):
            seq.finish_reason = FinishReason.LENGTH
        return outcome.tokens, prompt_logprobs

    def _new_prompt_logprobs(self, span: Span, outcome: Outcome) -> tuple[TokenLogprob, ...]:
        """Those not sent before a preemption. `outcome.prompt_logprobs` are for positions span.start + 1 and on."""
        expected = max(0, min(span.kv_len, self._num_logprobs_due) - span.start)
        if len(outcome.prompt_logprobs) != expected:
            num_given = len(outcome.prompt_logprobs)
            raise BadOutcome(f"the worker returned {num_given} prompt logprobs where {expected} were due")
        fresh = outcome.prompt_logprobs[max(0, self._num_logprobs_sent - span.start) :]
        self._num_logprobs_sent += len(fresh)
        return fresh

    def _append(self, token: int) -> None:
        seq = self._seq
        seq.tokens.append(token)
        if token in self._stop_ids:
            seq.finish_reason = FinishReason.STOP
            seq.stop_id = token
        elif len(seq.tokens) >= self._max_total:
            seq.finish_reason = FinishReason.LENGTH

    def restart(self) -> None:
        """Nothing to forget: all state is in the tokens, and sent prompt logprobs stay sent."""

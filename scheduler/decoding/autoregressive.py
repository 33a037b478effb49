"""One token after the other: prefill chunks, then one token a step, or several where drafts are verified.

A sequence is prompt + output; a resubmitted or preempted one arrives with output, which is prefilled like a prompt
(R4).

Where sparse rows are corrected, no span goes past the next multiple of `Attention.correct_every` output tokens before
those in front of it are computed again: as if these few were a prompt that is not computed yet, in chunks, with the
token behind them known already. After a preemption they are computed once, in their final form.
"""

from __future__ import annotations

from scheduler.attention import ALL_DENSE
from scheduler.decoding.base import After, BadOutcome, News, Widths
from scheduler.decoding.drafts import accepted_path, span_parents
from scheduler.sequence import Sequence
from scheduler.types import Drafts, FinishReason, Outcome, Read, Span, SpeculationUsage, TokenLogprob

_FIRST_ROW = (0,)
_SAMPLE = Read.SAMPLE


class Autoregressive:
    """Decoding state machine of an autoregressive request (protocol: decoding/base.py)."""

    __slots__ = (
        "_correct_at",
        "_dense_end",
        "_max_tokens",
        "_max_total",
        "_num_logprobs_due",
        "_num_logprobs_sent",
        "_seq",
        "_stop_ids",
        "_waits_for_tokens",
        "_wants_logprobs",
        "drafts",
    )

    is_denoiser = is_denoising = False
    grain = mask_block = least_rows = 1
    widths = Widths(1, 1)

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
        self._wants_logprobs = request.sampling.logprobs is not None
        self._waits_for_tokens = request.sampling.needs_tokens
        self.drafts: Drafts | None = None
        self._find_dense_end()

    def _find_dense_end(self) -> None:
        """The rows that are dense behind the last known token, and the position whose row waits for a correction."""
        seq, attention = self._seq, self._seq.request.attention
        self._dense_end, self._correct_at = 0, ALL_DENSE
        if attention is None or attention.lossless:
            return
        seq.dense_end = self._dense_end = attention.dense_end(len(seq.request.prompt), len(seq.tokens))
        if attention.correct_every:
            self._correct_at = seq.dense_end + attention.correct_every

    @property
    def judges_prompt(self) -> bool:
        return self._num_logprobs_sent < self._num_logprobs_due

    @property
    def prompt_end(self) -> int:
        return len(self._seq.tokens)

    @property
    def reach(self) -> int:
        return len(self._seq.tokens)

    @property
    def most_cached(self) -> int:
        """One token must be computed to get logits."""
        return len(self._seq.tokens) - 1

    @property
    def most_drafts(self) -> int:
        """The last of their rows is in front of the next correction."""
        return min(self._max_total - 1, self._correct_at) - len(self._seq.tokens)

    def next_span(self, budget: int, num_drafts: int = 0) -> Span:
        seq = self._seq
        start = seq.num_committed
        tokens = seq.tokens
        known = len(tokens)
        if seq.prefill_end <= start == known - 1:
            most = 0 if budget == 1 or self.drafts is None else min(budget - 1, self.most_drafts)
            if most > 0 and self.drafts is not None and self.drafts.tokens:
                return self._verify_span(self.drafts, most, num_drafts)
            one, dense_end = (tokens[start],), self._dense_end
            return Span(seq.seq_id, one, start, known, 1, _FIRST_ROW, _SAMPLE, (), num_drafts, None, (), dense_end)
        end = min(known, start + budget)
        judged = self._judged_rows(start, end)
        read = Read.SAMPLE if judged else Read.NOTHING
        chunk = tuple(tokens[start:end])
        return Span(seq.seq_id, chunk, start, end, 1, judged, read, (), num_drafts, dense_end=self._dense_end)

    def _verify_span(self, drafts: Drafts, most: int, num_drafts: int) -> Span:
        seq = self._seq
        start = seq.num_committed
        tokens = (seq.tokens[start], *drafts.tokens[:most])
        end, judged = start + len(tokens), tuple(range(len(tokens)))
        parents = span_parents(drafts, len(tokens) - 1)
        read, dense_end = Read.VERIFY, self._dense_end
        return Span(seq.seq_id, tokens, start, end, 1, judged, read, parents, num_drafts, dense_end=dense_end)

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

    def foresee(self, span: Span) -> After:
        """OPEN where drafts are at work, where prompt log-probabilities are read, where the host weighs what was
        sampled before the next token is, and before a correction."""
        num_judged, end = len(span.judged), span.kv_len
        is_last = end == len(self._seq.tokens)
        if span.num_drafts or self.drafts is not None or num_judged > is_last:
            return After.OPEN
        if end == self._correct_at:
            return After.OPEN
        if not is_last:
            return After.PROMPT
        if not num_judged or end + 1 >= self._max_total:
            return After.END
        return After.OPEN if self._waits_for_tokens else After.TOKEN

    def absorb(self, span: Span, outcome: Outcome) -> News:
        if span.read is Read.VERIFY:
            return self._absorb_verified(span, outcome)
        seq = self._seq
        end = span.kv_len
        expected = 1 if self._samples_at(end) else 0
        if len(outcome.tokens) != expected:
            raise BadOutcome(f"the worker returned {len(outcome.tokens)} tokens where {expected} was due")
        if self._wants_logprobs:
            _check_logprobs(outcome)
        if self.judges_prompt:
            prompt_logprobs = self._new_prompt_logprobs(span, outcome)
        else:
            prompt_logprobs = ()
        seq.num_committed = end
        if expected:
            # Drafts are for the token behind the last one, so those that came before a correction wait for its end.
            self.drafts = outcome.drafts
            self._append(outcome.tokens[0])
            self._correct_if_due()
        elif end == len(seq.tokens):
            seq.finish_reason = FinishReason.LENGTH
        return News(outcome.tokens, outcome.logprobs, prompt_logprobs)

    def _absorb_verified(self, span: Span, outcome: Outcome) -> News:
        """Accepted drafts and one more token. What follows a stop token, or does not fit any more, never existed."""
        seq = self._seq
        path = accepted_path(span, outcome.tokens)
        if path is None:
            given = len(outcome.tokens)
            raise BadOutcome(f"the worker returned {given} tokens that do not follow {len(span.tokens) - 1} drafts")
        if self._wants_logprobs:
            _check_logprobs(outcome)
        num_new = 0
        for token in outcome.tokens:
            self._append(token)
            num_new += 1
            if seq.finish_reason is not None:
                break
        # The KV of the token that was sampled last is not written yet, unless the text ended before it.
        seq.num_committed = min(span.start + len(outcome.tokens), len(seq.tokens))
        self._correct_if_due()
        usage = self._usage(len(span.tokens) - 1, min(len(path), num_new))
        self.drafts = outcome.drafts
        return News(outcome.tokens[:num_new], outcome.logprobs[:num_new], speculation=usage)

    def _usage(self, drafted: int, accepted: int) -> SpeculationUsage:
        is_predicted = self.drafts is not None and self.drafts.source == "prediction"
        return SpeculationUsage(drafted, accepted, 1, drafted * is_predicted, accepted * is_predicted)

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

    def _correct_if_due(self) -> None:
        """Turn the rows since the last correction into rows to compute, unless the text has ended."""
        seq = self._seq
        if seq.num_committed == self._correct_at and seq.finish_reason is None:
            seq.num_committed, seq.prefill_end = seq.dense_end, self._correct_at
            self._find_dense_end()

    def restart(self) -> None:
        """All state is in the tokens, sent prompt logprobs stay sent, and what was corrected will be dense at once;
        drafters start anew with the KV."""
        self.drafts = None
        if self._seq.drafting is not None:
            self._seq.drafting.num_seen = 0


def _check_logprobs(outcome: Outcome) -> None:
    if len(outcome.logprobs) != len(outcome.tokens):
        raise BadOutcome(f"the worker returned {len(outcome.logprobs)} logprobs for {len(outcome.tokens)} tokens")

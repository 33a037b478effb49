"""Block-causal diffusion: whole blocks of prompt, then block after block from masks to text.

Blocks lie at multiples of the block size B from position 0, so the end of the prompt may be the beginning of the first.
A block is denoised over its own scratch KV; when it is full its final KV is written in front of the next block's first
step (fused, 2B rows) or by itself (B rows): exact either way, and so is the last prompt chunk together with the first
step. With shift 1 the pass that writes a block's KV also gives the next block's first token.

`Sequence.tokens` are prompt and emitted output; the block that is being denoised is kept here. Source: diffusion
reference, sections 1, 7 and 9.5-9.8.
"""

from __future__ import annotations

from scheduler.decoding.auto_threshold import AutoThreshold
from scheduler.decoding.base import After, BadOutcome, News, Widths
from scheduler.decoding.block import Block, block_rules, most_tokens, shadow_rows
from scheduler.sequence import Sequence
from scheduler.types import (
    DecodingUsage,
    Denoise,
    Denoised,
    DiffusionModel,
    Drafts,
    FinishReason,
    Outcome,
    Read,
    Snapshot,
    Span,
    TokenLogprob,
)

_NOTHING = DecodingUsage()


class BlockDiffusion:
    """Decoding state machine of a request to a block-causal diffusion model (protocol: decoding/base.py)."""

    is_denoiser = True
    judges_prompt = False
    most_drafts = 0

    def __init__(self, seq: Sequence, max_model_len: int, model: DiffusionModel) -> None:
        request = seq.request
        assert request.decoding is not None, "an autoregressive request has no blocks"
        self.drafts: Drafts | None = None
        self._seq = seq
        self._how = request.decoding
        self._model = model
        self._size = model.block_size
        self._rules = block_rules(self._how, self._size)
        self._auto = AutoThreshold(self._how.selector) if self._how.selector.name == "auto" else None
        # A shadow of the block needs slots behind it (WINO), the last block included.
        self._shadow = shadow_rows(self._how, self._size)
        wanted = len(request.prompt) + request.max_tokens
        self._max_total = min(most_tokens(self._how, self._size, max_model_len), wanted)
        self._stop_ids = frozenset(request.stop_ids)
        self._wants_logprobs = request.sampling.logprobs is not None
        self._usage = _NOTHING
        # What `auto` has learnt hangs on all of its past: a resubmitted request walks through it again.
        first = len(seq.tokens) if self._auto is None else len(request.prompt)
        self._block = self._block_at(first // self._size * self._size)
        self._saved = self._save()
        self._prompt_end = self._block.lo

    @property
    def grain(self) -> int:
        return self._size

    @property
    def mask_block(self) -> int:
        return self._size

    @property
    def least_rows(self) -> int:
        return self._size + self._shadow

    @property
    def prompt_end(self) -> int:
        return self._block.lo if self._is_carry_due else self._block.hi

    @property
    def reach(self) -> int:
        return self._block.hi + self._shadow

    @property
    def most_cached(self) -> int:
        return self._block.lo - 1 if self._is_carry_due else self._block.lo

    @property
    def is_denoising(self) -> bool:
        return self._seq.num_committed >= self._prompt_end

    @property
    def widths(self) -> Widths:
        block = self._block
        if self._seq.num_committed < block.lo:
            can_fuse = not self._is_carry_due and not self._shadow
            return Widths(self._size, 2 * self._size if can_fuse else self._size)
        first, end = self._rows()
        rows = end - first + self._shadow
        return Widths(rows, rows)

    @property
    def _is_carry_due(self) -> bool:
        """With shift 1 the block's first token comes from the row before the block."""
        return bool(self._model.shift) and self._block.tokens[0] == self._model.mask_id

    def _block_at(self, lo: int) -> Block:
        return Block.start(self._how, self._rules, self._model.mask_id, lo, self._size, self._seq.request.prompt)

    def next_span(self, budget: int, num_drafts: int = 0) -> Span:
        block, start = self._block, self._seq.num_committed
        if start < self._prompt_end:
            return self._prompt_span(start, budget)
        if start == block.lo:
            return self._denoise_span(start)
        if self._is_carry_due:
            return self._carry_span(start)
        if budget < 2 * self._size or self._shadow:
            return self._clean_span(start, block.lo)
        return self._denoise_span(start)

    def _prompt_span(self, start: int, budget: int) -> Span:
        block = self._block
        rows = budget // self._size * self._size
        if start + rows < block.lo:
            return self._clean_span(start, start + rows)
        if self._is_carry_due:
            return self._carry_span(start)
        if start + rows < block.hi or self._shadow:
            return self._clean_span(start, block.lo)
        return self._denoise_span(start)

    def _clean_span(self, start: int, end: int) -> Span:
        """Finished blocks, or blocks of prompt: their final KV."""
        seq = self._seq
        return Span(seq.seq_id, tuple(seq.tokens[start:end]), start, end, self._size)

    def _carry_span(self, start: int) -> Span:
        """The same up to the block, and its last row answers for the block's first token."""
        block = self._block
        span = self._clean_span(start, block.lo)
        denoise = self._denoise((block.lo, block.lo + 1), tuple(block.tokens), quota=1)
        return span._replace(judged=(len(span.tokens) - 1,), read=Read.DENOISE, denoise=denoise)

    def _denoise_span(self, start: int) -> Span:
        """The block, or its rows that are not cached, behind blocks that are not committed yet, before its shadow."""
        seq, block = self._seq, self._block
        first, end = self._rows() if start == block.lo else (start, block.hi)
        clean, own = seq.tokens[first : block.lo], block.tokens[max(0, first - block.lo) : end - block.lo]
        shadow = (self._model.mask_id,) * self._shadow
        num_rows = end - first
        judged = block.judged(first, end, self._model.shift) + tuple(range(num_rows, num_rows + self._shadow))
        state = () if len(own) == self._size else tuple(block.tokens)
        denoise = self._denoise(block.window(), state)
        tokens = (*clean, *own, *shadow)
        kv_len = block.hi + self._shadow
        return Span(seq.seq_id, tokens, first, kv_len, self._size, judged, Read.DENOISE, denoise=denoise)

    def _denoise(self, window: tuple[int, int], state: tuple[int, ...], quota: int = 0) -> Denoise:
        block = self._block
        return Denoise(
            block.lo,
            block.hi,
            block.step,
            quota or block.quota,
            window,
            block.progress,
            None if self._auto is None else self._auto.value,
            block.is_last,
            self._shadow,
            state,
        )

    def _rows(self) -> tuple[int, int]:
        """Sequence positions of the block's rows in the next step: all, unless the cache has those of the others."""
        block = self._block
        if self._how.cache.name == "sub_block":
            window = block.window()
            has_first = not self._model.shift or block.tokens[window[0] - block.lo] != self._model.mask_id
            if window == block.fresh_window and has_first:
                return window
        return block.lo, block.hi

    def foresee(self, span: Span) -> After:
        return After.OPEN

    def absorb(self, span: Span, outcome: Outcome) -> News:
        seq = self._seq
        denoise, denoised = span.denoise, outcome.denoised
        if denoise is None:
            if outcome.tokens or denoised is not None:
                raise BadOutcome(f"the worker returned {len(outcome.tokens)} tokens where none was due")
            self._count(span, commits=1)
            seq.num_committed = span.kv_len
            return News()
        if denoised is None:
            raise BadOutcome("the worker returned no changes where a denoise step was due")
        if self._wants_logprobs and len(outcome.logprobs) != len(outcome.tokens):
            raise BadOutcome(f"the worker returned {len(outcome.logprobs)} logprobs for {len(outcome.tokens)} tokens")
        self._block.check(denoise.window, outcome.tokens, denoised, denoise.is_last)
        self._count(span, forwards=1)
        seq.num_committed = denoise.lo
        seq.prefill_end = denoise.hi
        self._change(denoise, span.kv_len, outcome, denoised)
        return self._emit()

    def _change(self, denoise: Denoise, kv_len: int, outcome: Outcome, denoised: Denoised) -> None:
        """Put the worker's changes into the block."""
        block = self._block
        logprobs = outcome.logprobs if self._wants_logprobs else (None,) * len(outcome.tokens)
        tokens = [self._as_emitted(*change) for change in zip(denoised.positions, outcome.tokens, strict=True)]
        block.apply(tokens, logprobs, denoised)
        if self._auto is not None:
            self._auto.learn(dict(zip(denoised.positions, tokens, strict=True)), denoised.guesses)
        if kv_len < block.hi:
            # A carried token is no step of the block's own: its masks are counted without it.
            block.first_step, block.num_masks = block.step, block.num_masks - 1
        elif not denoise.state:
            block.fresh_window = denoise.window

    def _as_emitted(self, position: int, token: int) -> int:
        """A resubmitted request's last block is denoised again, all of its blocks for `auto`. That gives the tokens it
        gave; if it should not, what is on a client's screen stands."""
        seq = self._seq
        is_out = position < len(seq.tokens) and token != self._model.mask_id
        return seq.tokens[position] if is_out and not self._rules.is_final_late else token

    def _emit(self) -> News:
        """What can no longer change leaves (R8); a block that is done is followed by the next."""
        seq, block = self._seq, self._block
        snapshot = Snapshot(block.lo, tuple(block.tokens), block.step) if self._how.snapshots else None
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        is_done = block.is_done
        if is_done or not self._rules.is_final_late:
            self._release(tokens, logprobs)
        if seq.finish_reason is None and is_done:
            self._block = self._block_at(block.hi)
            seq.prefill_end = self._block.hi
            if self._auto is not None:
                self._auto.forget_guesses()
        if self._how.cache.name == "sub_block" and (is_done or block.window() != block.fresh_window):
            self._saved = self._save()
        usage: DecodingUsage | None = None
        if tokens or snapshot is not None or seq.finish_reason is not None:
            usage, self._usage = self._usage, _NOTHING
        return News(tuple(tokens), tuple(logprobs), decoding=usage, snapshot=snapshot)

    def _release(self, tokens: list[int], logprobs: list[TokenLogprob]) -> None:
        """Append to the sequence, and to these lists, what is fixed behind its last token."""
        seq, block = self._seq, self._block
        for offset in range(len(seq.tokens) - block.lo, block.end):
            token = block.tokens[offset]
            if token == self._model.mask_id:
                return
            seq.tokens.append(token)
            tokens.append(token)
            logprob = block.logprobs[offset]
            if logprob is not None:
                logprobs.append(logprob)
            if token in self._stop_ids:
                seq.finish_reason = FinishReason.STOP
                seq.stop_id = token
                return
            if len(seq.tokens) >= self._max_total:
                seq.finish_reason = FinishReason.LENGTH
                return
        if block.end < self._size:
            seq.finish_reason = FinishReason.STOP

    def _count(self, span: Span, forwards: int = 0, commits: int = 0) -> None:
        """Rows of the prompt are no part of what denoising took."""
        rows = len(span.tokens) - max(0, self._prompt_end - span.start)
        if rows > 0 or forwards:
            self._usage += DecodingUsage(forwards, commits, max(0, rows))

    def _save(self) -> tuple[Block, AutoThreshold | None]:
        return self._block.copy(), None if self._auto is None else self._auto.copy()

    def restart(self) -> None:
        """The block goes on from the step it has come to. Where rows are cached over several steps it goes back to the
        step that computed them all: the same steps again give the same tokens."""
        if self._how.cache.name == "sub_block":
            block, auto = self._saved
            self._block, self._auto = block.copy(), None if auto is None else auto.copy()
        self._prompt_end = self._block.lo

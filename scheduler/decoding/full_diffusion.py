"""Denoising of a whole canvas by a bidirectional model: prompt and G masks, filled in any order, read from the left.

Nothing is final before the end: every key depends on every token, so `num_committed` stays 0, no page is ever shared,
and a step computes all rows or those that the request's cache names (`caches.py`). A step is whole or not at all.
Tokens are a function of (seed, sample, position, step), so a request that is sent again after a crash is denoised again
from its masks and emits only what was not out yet. After a preemption the canvas goes on as it was with a step that
computes all rows: exact without a cache, and one more approximation with one.
Sources: LLaDA, Dream (samplers); diffusion reference, sections 3, 5, 6 and 9.
"""

from __future__ import annotations

from scheduler.decoding.auto_threshold import AutoThreshold
from scheduler.decoding.base import BadOutcome, News, Widths
from scheduler.decoding.caches import CacheState, View, plan_rows
from scheduler.decoding.canvas import (
    ADABLOCK_SHARE,
    BLOCKLESS_PLANNERS,
    block_size_of,
    canvas_length,
    canvas_quota,
    drawn_order,
    make_span,
    position_of,
)
from scheduler.decoding.windows import plan_window
from scheduler.sequence import Sequence
from scheduler.types import (
    MASK_ALL,
    DecodingUsage,
    Denoise,
    Denoised,
    DiffusionModel,
    Drafts,
    EosRule,
    FinishReason,
    Outcome,
    Snapshot,
    Span,
    TokenLogprob,
)

_ALMOST_ONE = 1.0 - 2.0**-20


class FullDiffusion:
    """Decoding state machine of a request to a bidirectional model (protocol: decoding/base.py).

    The request has `decoding`, and `canvas.refuse_canvas` has let it pass.
    """

    def __init__(self, seq: Sequence, model: DiffusionModel, max_model_len: int) -> None:
        request = seq.request
        asked = request.decoding
        assert asked is not None, "an autoregressive request has no canvas"
        self._seq, self._asked = seq, asked
        self._mask_id, self._shift = model.mask_id, model.shift
        self._num_prompt = len(request.prompt)
        length = canvas_length(request, asked, model, max_model_len)
        self._canvas = [*request.prompt, *[model.mask_id] * length]
        self._end = len(self._canvas)
        self._max_total = min(self._num_prompt + request.max_tokens, self._end)
        self._stop_ids = frozenset(request.stop_ids)
        self._wants_logprobs = request.sampling.logprobs is not None
        self._logprobs: dict[int, TokenLogprob] = {}
        self._block_size = block_size_of(asked, model)
        steps_per_block = self._block_size if asked.steps is None else asked.steps
        self._steps_total = max(1, -(-length // self._block_size) * steps_per_block)
        self._steps_done = 0
        self._cache = CacheState()
        self._fresh: tuple[int, ...] = ()
        self._is_cut = False
        self._usage = DecodingUsage()
        self._span: Span | None = None
        self._auto = AutoThreshold(asked.selector) if asked.selector.name == "auto" else None
        self._order: dict[int, bytes] = {}
        if asked.selector.name == "random" and asked.eos is not EosRule.LAST:
            seed, sample = request.sampling.seed, request.sampling.sample_index
            self._order = drawn_order(seed, sample, self._num_prompt, self._end)
        self._open_block(self._num_prompt)
        self.drafts: Drafts | None = None

    def _open_block(self, lo: int) -> None:
        """The block from `lo` on, or what is left of the canvas."""
        self._lo = lo
        self._hi = self._end if self._is_blockless else min(lo + self._block_size, self._end)
        self._block_masks = self._canvas[lo : self._hi].count(self._mask_id)
        self._step = self._num_edits = 0

    @property
    def _is_blockless(self) -> bool:
        return self._asked.planner.name in BLOCKLESS_PLANNERS

    @property
    def judges_prompt(self) -> bool:
        return False

    @property
    def most_drafts(self) -> int:
        return 0

    @property
    def is_denoiser(self) -> bool:
        return True

    @property
    def is_denoising(self) -> bool:
        return True

    @property
    def grain(self) -> int:
        return 1

    @property
    def mask_block(self) -> int:
        return MASK_ALL

    @property
    def prompt_end(self) -> int:
        """The canvas is computed with the prompt from the first step on; there is no prefill."""
        return self._end

    @property
    def reach(self) -> int:
        return self._end

    @property
    def most_cached(self) -> int:
        return 0

    @property
    def widths(self) -> Widths:
        rows = len(self.next_span(1).tokens)
        return Widths(rows, rows)

    def _masks(self, lo: int, hi: int) -> list[int]:
        mask_id, canvas = self._mask_id, self._canvas
        return [position for position in range(lo, hi) if canvas[position] == mask_id]

    def next_span(self, budget: int, num_drafts: int = 0) -> Span:
        """One denoising step, of as many rows as it takes: what is asked for here is told by `widths`."""
        if self._span is None or self._span.seq_id != self._seq.seq_id:
            self._span = self._plan()
        return self._span

    def _plan(self) -> Span:
        asked, start, end = self._asked, self._num_prompt, self._end
        masks, window = self._masks(start, end), self._window()
        left = sum(window[0] <= mask < window[1] for mask in masks)
        in_block = sum(self._lo <= mask < self._hi for mask in masks)
        least = max(1, min(canvas_quota(asked, self._block_masks, in_block, self._step), left))
        drawn = self._drawn(masks, window, least)
        view = View(
            end, self._lo, self._hi, self._block_size, window, self._step, masks, self._fresh, drawn, self._shift
        )
        rows = plan_rows(asked.cache, view, self._cache)
        targets = drawn or self._targets(masks, window, rows is None)
        denoise = Denoise(
            start,
            end,
            self._step,
            least,
            window,
            min(self._steps_done / self._steps_total, _ALMOST_ONE),
            None if self._auto is None else self._auto.at(0.0),
            state=tuple(self._canvas[start:end]),
        )
        return make_span(self._seq.seq_id, self._canvas[:end], rows, [p - self._shift for p in targets], denoise)

    def _window(self) -> tuple[int, int]:
        """The positions [first, end) that may be fixed: all of a block that is only edited any more."""
        start, lo, hi = self._num_prompt, self._lo, self._hi
        if not self._masks(lo, hi):
            return lo, hi
        tokens = self._canvas[start : self._end]
        first, end = plan_window(self._asked.planner, tokens, self._mask_id, lo - start, hi - start, 0)
        return start + first, start + end

    def _drawn(self, masks: list[int], window: tuple[int, int], count: int) -> list[int]:
        """The positions that are next in the order drawn beforehand, ascending; none where there is no such order."""
        if not self._order:
            return []
        inside = (mask for mask in masks if window[0] <= mask < window[1])
        return sorted(sorted(inside, key=self._order.__getitem__)[:count])

    def _targets(self, masks: list[int], window: tuple[int, int], is_full: bool) -> list[int]:
        """Positions to judge: the window's masks, and others that selector, planner or stopper want to see."""
        asked, (first, end) = self._asked, window
        if asked.selector.name in ("learn2pd", "edit"):
            return list(range(first, end))
        if asked.stopper.name == "prophet" and is_full:
            return masks
        if asked.selector.name == "auto":
            first, end = self._lo, self._hi
        if asked.planner.name == "adablock" and self._step == 0:
            end = max(end, min(first + (self._end - self._num_prompt) // ADABLOCK_SHARE, self._end))
        return [mask for mask in masks if first <= mask < end]

    def absorb(self, span: Span, outcome: Outcome) -> News:
        denoised, denoise = outcome.denoised, span.denoise
        if denoised is None or denoise is None:
            raise BadOutcome("the worker did not say what a denoising step changed")
        self._check(span, outcome, denoised)
        was_full = not self._masks(self._lo, self._hi)
        for position, token in zip(denoised.positions, outcome.tokens, strict=True):
            self._canvas[position] = self._emitted(position, token)
        self._logprobs.update(zip(denoised.positions, outcome.logprobs, strict=False))
        is_refresh = len(span.tokens) - denoise.shadow == self._end
        self._cache.absorb(is_refresh, len(denoised.positions), denoised.is_stale, denoised.tracked)
        self._fresh = denoised.positions
        self._usage += DecodingUsage(1, 0, len(span.tokens))
        self._steps_done += 1
        self._step += 1
        self._span = None
        if self._auto is not None:
            self._auto.learn(dict(zip(denoised.positions, outcome.tokens, strict=True)), denoised.guesses)
        self._advance(denoised, was_full)
        return self._emit()

    def _emitted(self, position: int, token: int) -> int:
        """What a client has stands, should a cache ever make a replay choose otherwise."""
        number = position - self._num_prompt
        output = self._seq.request.output
        return output[number] if number < len(output) and token != self._mask_id else token

    def _check(self, span: Span, outcome: Outcome, denoised: Denoised) -> None:
        """Raise BadOutcome for news that do not answer the span."""
        positions, tokens = denoised.positions, outcome.tokens
        if len(positions) != len(tokens) or list(positions) != sorted(set(positions)):
            raise BadOutcome(f"the worker returned {len(tokens)} tokens for positions {positions}")
        if self._wants_logprobs and len(outcome.logprobs) != len(tokens):
            raise BadOutcome(f"the worker returned {len(outcome.logprobs)} logprobs for {len(tokens)} tokens")
        judged = {position_of(span, offset) + self._shift for offset in span.judged}
        if not judged.issuperset(positions):
            raise BadOutcome("the worker changed positions that were not judged")
        if denoised.end is not None and denoised.end <= self._masks(self._num_prompt, self._end)[0]:
            raise BadOutcome("the worker ended the text before its first mask")
        if self._asked.selector.name in ("edit", "wino"):
            return
        if not positions:
            raise BadOutcome("the worker fixed nothing in a denoising step")
        if any(self._canvas[position] != self._mask_id for position in positions) or self._mask_id in tokens:
            raise BadOutcome("the worker changed a token that was fixed, or fixed a mask")

    def _advance(self, denoised: Denoised, was_full: bool) -> None:
        """Shorten the canvas, settle the window, and go on to the next block that has masks."""
        if denoised.end is not None and denoised.end < self._end:
            self._end = denoised.end
            self._is_cut = True
            self._hi = min(self._hi, self._end)
        if denoised.window_end is not None and self._asked.planner.name == "adablock":
            self._hi = min(max(denoised.window_end, self._lo + 1), self._end)
            self._block_masks = self._canvas[self._lo : self._hi].count(self._mask_id)
        is_done = self._is_block_done(denoised, was_full)
        while is_done and self._lo < self._end:
            if self._auto is not None:
                self._auto.forget_guesses()
            self._open_block(self._hi)
            is_done = not self._masks(self._lo, self._hi)

    def _is_block_done(self, denoised: Denoised, was_full: bool) -> bool:
        """No masks are left; and where tokens may be edited, the last step changed none or there were enough."""
        if self._masks(self._lo, self._hi):
            return False
        if self._asked.selector.name != "edit":
            return True
        self._num_edits += was_full
        return (was_full and not denoised.positions) or self._num_edits >= self._asked.selector["max_post_edits"]

    def _emit(self) -> News:
        """Tokens of the contiguous prefix that are not out yet; ends the sequence at a stop token or its length."""
        seq, canvas = self._seq, self._canvas
        limit = self._lo if self._asked.selector.name in ("edit", "wino") else self._end
        first = len(seq.tokens)
        while len(seq.tokens) < limit and canvas[len(seq.tokens)] != self._mask_id and seq.finish_reason is None:
            token = canvas[len(seq.tokens)]
            seq.tokens.append(token)
            if token in self._stop_ids:
                seq.finish_reason, seq.stop_id = FinishReason.STOP, token
            elif len(seq.tokens) >= self._max_total:
                seq.finish_reason = FinishReason.LENGTH
        if seq.finish_reason is None and self._lo >= self._end:
            seq.finish_reason = FinishReason.STOP if self._is_cut else FinishReason.LENGTH
        tokens = tuple(seq.tokens[first:])
        logprobs = tuple(self._logprobs.pop(at) for at in range(first, len(seq.tokens))) if self._wants_logprobs else ()
        snapshot = Snapshot(self._lo, tuple(canvas[self._lo : self._hi]), self._step) if self._asked.snapshots else None
        if not tokens and seq.finish_reason is None and snapshot is None:
            return News()
        usage, self._usage = self._usage, DecodingUsage()
        return News(tokens, logprobs, decoding=usage, snapshot=snapshot)

    def restart(self) -> None:
        """The next step computes all rows; what was fixed stays."""
        self._cache.restart()
        self._span = None

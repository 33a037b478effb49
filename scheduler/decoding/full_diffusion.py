"""Denoising of a whole canvas by a bidirectional model: prompt and G masks, filled in any order, read from the left.

Nothing is final before the end: every key depends on every token, so `num_committed` stays 0, no page is ever shared,
and a step computes all rows or those that the request's cache names (caches.py). A step is whole or not at all.

Tokens are a function of (seed, sample, position, step), so a request that is sent again after a crash is denoised again
from its masks and emits only what was not out yet. After a preemption, without a cache, the canvas goes on as it was;
with one, it goes back to the last step that computed all rows: the same steps again give the same tokens.
Sources: LLaDA, Dream (samplers); diffusion reference, sections 3, 5, 6 and 9.
"""

from __future__ import annotations

from scheduler.decoding.auto_threshold import AutoThreshold
from scheduler.decoding.base import After, BadOutcome, News, Widths
from scheduler.decoding.caches import View, plan_rows
from scheduler.decoding.canvas import (
    ADABLOCK_SHARE,
    BLOCKLESS_PLANNERS,
    Canvas,
    block_size_of,
    canvas_length,
    canvas_quota,
    drawn_order,
    judged_positions,
    make_span,
    num_shadows,
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
)

_ALMOST_ONE = 1.0 - 2.0**-20
_NOTHING = DecodingUsage()


class FullDiffusion:
    """Decoding state machine of a request to a bidirectional model (protocol: decoding/base.py).

    The request has `decoding`, and `canvas.refuse_canvas` has let it pass.
    """

    is_denoiser = is_denoising = True
    judges_prompt = False
    most_drafts = most_cached = 0
    grain = 1
    mask_block = MASK_ALL

    def __init__(self, seq: Sequence, max_model_len: int, model: DiffusionModel) -> None:
        request = seq.request
        asked = request.decoding
        assert asked is not None, "an autoregressive request has no canvas"
        self.drafts: Drafts | None = None
        self._seq, self._asked, self._model = seq, asked, model
        selector, size, start = asked.selector.name, block_size_of(asked, model), len(request.prompt)
        length = canvas_length(request, asked, model, max_model_len)
        self._block_size = length if asked.planner.name in BLOCKLESS_PLANNERS else size
        self._refresh_size = size
        self._length = length
        # Tokens that may change again leave when their block is over (R8).
        self._is_late = selector in ("edit", "wino")
        self._max_total = start + min(request.max_tokens, length)
        self._stop_ids = frozenset(request.stop_ids)
        self._wants_logprobs = request.sampling.logprobs is not None
        steps = min(size, length) if asked.steps is None else asked.steps
        self._steps_total = max(1, -(-length // size) * steps)
        self._order: dict[int, bytes] = {}
        # What looks at more than the masks to fix leaves the lot to the worker.
        is_blind = asked.eos is not EosRule.LAST and asked.stopper.name == "eos" and asked.planner.name != "adablock"
        if selector == "random" and is_blind:
            sampling = request.sampling
            self._order = drawn_order(sampling.seed, sampling.sample_index, start, start + length)
        self._usage = _NOTHING
        self._span: Span | None = None
        tokens = [*request.prompt, *[model.mask_id] * length]
        self._canvas = Canvas(
            model.mask_id, tokens, start, AutoThreshold(asked.selector) if selector == "auto" else None
        )
        self._canvas.open_block(start, self._block_size)
        self._saved: Canvas | None = None

    @property
    def prompt_end(self) -> int:
        """The canvas is computed with the prompt from the first step on; there is no prefill."""
        return self._canvas.end

    @property
    def reach(self) -> int:
        """Pages for everything from the first step on; shadows stand behind the canvas (WINO)."""
        return self._canvas.end + num_shadows(self._asked, self._model)

    @property
    def least_rows(self) -> int:
        return self.reach

    @property
    def widths(self) -> Widths:
        rows = len(self.next_span(1).tokens)
        return Widths(rows, rows)

    def next_span(self, budget: int, num_drafts: int = 0) -> Span:
        """One denoising step, of as many rows as it takes: what is asked for here is told by `widths`."""
        if self._span is None or self._span.seq_id != self._seq.seq_id:
            self._span = self._plan()
        return self._span

    def _plan(self) -> Span:
        asked, at = self._asked, self._canvas
        masks, window = at.masks(at.start, at.end), self._window()
        left = sum(window[0] <= mask < window[1] for mask in masks)
        least = max(1, min(canvas_quota(asked, at.num_masks, len(at.block_masks), at.step), left))
        drawn = self._drawn(masks, window, least)
        view = View(
            at.end, at.lo, at.hi, self._refresh_size, window, at.step, masks, at.fresh, drawn, self._model.shift
        )
        rows = plan_rows(asked.cache, view, at.cache)
        targets = drawn or self._targets(masks, window, rows is None)
        is_wino = asked.selector.name == "wino"
        lo, hi = (at.lo, at.hi) if is_wino else (at.start, at.end)
        denoise = Denoise(
            lo,
            hi,
            at.step,
            least,
            window,
            min(at.steps_done / self._steps_total, _ALMOST_ONE),
            None if at.auto is None else at.auto.value,
            is_last=is_wino and at.step + 1 >= 2 * (hi - lo),
            shadow=hi - lo if is_wino else 0,
            state=tuple(at.tokens[lo:hi]),
        )
        judged = [target - self._model.shift for target in targets]
        return make_span(self._seq.seq_id, at.tokens, self._model.mask_id, rows, judged, denoise)

    def _window(self) -> tuple[int, int]:
        """The positions [first, end) that may be fixed: all of a block that is only edited any more.

        AdaBlock's first step of a block may fix what stands before the delimiter that the worker finds in it; it looks
        further than a block is long.
        """
        at, planner = self._canvas, self._asked.planner
        if not at.block_masks:
            return at.lo, at.hi
        if planner.name == "adablock" and at.step == 0:
            return at.lo, min(at.lo + max(self._block_size, self._length // ADABLOCK_SHARE), at.end)
        lo, hi, start = at.lo, at.hi, at.start
        first, end = plan_window(planner, at.tokens[start:], at.mask_id, lo - start, hi - start, 0)
        return start + first, start + end

    def _drawn(self, masks: list[int], window: tuple[int, int], count: int) -> list[int]:
        """The positions that are next in the order drawn beforehand, ascending; none where there is no such order."""
        if not self._order:
            return []
        inside = (mask for mask in masks if window[0] <= mask < window[1])
        return sorted(sorted(inside, key=self._order.__getitem__)[:count])

    def _targets(self, masks: list[int], window: tuple[int, int], is_full: bool) -> list[int]:
        """Positions to judge: the window's masks, and others that selector or stopper want to see."""
        asked, at = self._asked, self._canvas
        if asked.selector.name in ("learn2pd", "edit"):
            return list(range(at.lo, at.hi))
        if asked.stopper.name == "prophet" and is_full:
            return masks
        if asked.selector.name == "auto" or asked.stopper.name == "eotp":
            return [mask for mask in masks if min(at.lo, window[0]) <= mask < max(at.hi, window[1])]
        return [mask for mask in masks if window[0] <= mask < window[1]]

    def foresee(self, span: Span) -> After:
        return After.OPEN

    def absorb(self, span: Span, outcome: Outcome) -> News:
        denoised, denoise, at = outcome.denoised, span.denoise, self._canvas
        if denoised is None or denoise is None:
            raise BadOutcome("the worker did not say what a denoising step changed")
        self._check(span, denoise, outcome, denoised)
        is_refresh = len(span.tokens) == span.kv_len
        if is_refresh and self._asked.cache.name != "none":
            self._saved = at.copy()
        was_full = not at.block_masks
        fixed = {
            position: self._as_emitted(position, token)
            for position, token in zip(denoised.positions, outcome.tokens, strict=True)
        }
        for position, token in fixed.items():
            at.tokens[position] = token
        at.logprobs.update(zip(denoised.positions, outcome.logprobs, strict=False))
        at.cache.absorb(is_refresh, len(fixed), denoised.is_stale, denoised.tracked)
        at.fresh = denoised.positions
        at.steps_done += 1
        at.step += 1
        if at.auto is not None:
            at.auto.learn(fixed, denoised.guesses)
        self._usage += DecodingUsage(1, 0, len(span.tokens))
        self._span = None
        self._advance(denoised, was_full)
        return self._emit()

    def _as_emitted(self, position: int, token: int) -> int:
        """What is on a client's screen stands, should steps that are done again ever choose otherwise."""
        seq = self._seq
        is_out = position < len(seq.tokens) and token != self._model.mask_id
        return seq.tokens[position] if is_out and not self._is_late else token

    def _check(self, span: Span, denoise: Denoise, outcome: Outcome, denoised: Denoised) -> None:
        """Raise BadOutcome for news that do not answer the span."""
        positions, tokens, at = denoised.positions, outcome.tokens, self._canvas
        if len(positions) != len(tokens) or list(positions) != sorted(set(positions)):
            raise BadOutcome(f"the worker returned {len(tokens)} tokens for positions {positions}")
        if self._wants_logprobs and len(outcome.logprobs) != len(tokens):
            raise BadOutcome(f"the worker returned {len(outcome.logprobs)} logprobs for {len(tokens)} tokens")
        may_change = set(range(at.lo, at.hi)) if denoise.shadow else judged_positions(span, self._model.shift)
        if not may_change.issuperset(positions):
            raise BadOutcome(f"the worker changed positions that were not judged: {positions}")
        masks = set(at.masks(at.start, at.end))
        if denoised.end is not None and not min(masks, default=at.end) < denoised.end:
            raise BadOutcome(f"the text would end at {denoised.end}, before its first mask")
        num_fixed = sum(p in masks and t != at.mask_id for p, t in zip(positions, tokens, strict=True))
        if self._is_late:
            num_masked = tokens.count(at.mask_id)
            if at.block_masks and num_masked and num_masked >= num_fixed:
                raise BadOutcome(f"the worker fixed {num_fixed} masks and set {num_masked} again: the block has no end")
            return
        if not positions or num_fixed < len(positions):
            raise BadOutcome(f"the worker fixed {num_fixed} masks and changed {len(positions)} positions")

    def _advance(self, denoised: Denoised, was_full: bool) -> None:
        """Shorten the canvas, settle the window, and go on to the next block that has masks."""
        at = self._canvas
        if denoised.end is not None:
            at.cut(denoised.end)
        if denoised.window_end is not None and at.step == 1:
            at.hi = min(max(denoised.window_end, at.lo + 1), at.end)
            at.num_masks = at.hi - at.lo
        is_done = self._is_block_done(denoised, was_full)
        while is_done and at.lo < at.end:
            at.open_block(at.hi, self._block_size)
            is_done = not at.block_masks

    def _is_block_done(self, denoised: Denoised, was_full: bool) -> bool:
        """No masks are left; and where tokens may be edited, the last step changed none or there were enough."""
        at, selector = self._canvas, self._asked.selector
        if at.block_masks:
            return False
        if selector.name != "edit":
            return True
        at.num_edits += was_full
        return (was_full and not denoised.positions) or at.num_edits >= selector["max_post_edits"]

    def _emit(self) -> News:
        """Tokens of the contiguous prefix that are not out yet; ends the sequence at a stop token or its length."""
        seq, at = self._seq, self._canvas
        limit = at.lo if self._is_late else at.end
        first = len(seq.tokens)
        while seq.finish_reason is None and len(seq.tokens) < limit and at.tokens[len(seq.tokens)] != at.mask_id:
            token = at.tokens[len(seq.tokens)]
            seq.tokens.append(token)
            if token in self._stop_ids:
                seq.finish_reason, seq.stop_id = FinishReason.STOP, token
            elif len(seq.tokens) >= self._max_total:
                seq.finish_reason = FinishReason.LENGTH
        if seq.finish_reason is None and at.lo >= at.end:
            seq.finish_reason = FinishReason.STOP if at.is_cut else FinishReason.LENGTH
        tokens = tuple(seq.tokens[first:])
        logprobs = tuple(at.logprobs[p] for p in range(first, len(seq.tokens))) if self._wants_logprobs else ()
        snapshot = Snapshot(at.lo, tuple(at.tokens[at.lo : at.hi]), at.step) if self._asked.snapshots else None
        if not tokens and seq.finish_reason is None and snapshot is None:
            return News()
        usage, self._usage = self._usage, _NOTHING
        return News(tokens, logprobs, decoding=usage, snapshot=snapshot)

    def restart(self) -> None:
        """The pages are gone: the next step computes all rows."""
        if self._saved is not None:
            self._canvas, self._saved = self._saved, None
        self._canvas.cache.restart()
        self._span = None

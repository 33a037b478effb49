"""The oracle of block-causal requests: one request against the fake model, block after block, and no scheduler.

Written from the rules (diffusion reference, 9.5 and 9.6), not from the state machine: no fused steps, no chunks, no
preemption. Only the planners' windows and the threshold's controller are shared; they have tests of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.decoding.auto_threshold import AutoThreshold
from scheduler.decoding.windows import plan_window
from scheduler.fake_denoiser import denoise_logprob, read_block, write_rows
from scheduler.hashing import mix
from scheduler.types import Denoise, Denoised, Diffusion, DiffusionModel, FinishReason, Request, TokenLogprob


@dataclass
class Alone:
    """What a request came to. tokens: new ones, after `Request.output`; num_steps: denoise steps."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason = FinishReason.LENGTH
    num_steps: int = 0


def denoise_alone(request: Request, max_model_len: int, model: DiffusionModel, vocab_size: int) -> Alone:
    """Run a request to its end."""
    return _Run(request, max_model_len, model, vocab_size).run()


class _Run:
    def __init__(self, request: Request, max_model_len: int, model: DiffusionModel, vocab_size: int) -> None:
        assert request.decoding is not None
        self.request, self.model, self.vocab_size = request, model, vocab_size
        self.how: Diffusion = request.decoding
        self.selector = self.how.selector.name
        self.size, self.mask = model.block_size, model.mask_id
        self.kv: dict[int, int] = {}
        self.out = Alone()
        self.auto = AutoThreshold(self.how.selector) if self.selector == "auto" else None
        space = max_model_len - (self.size if self.selector == "wino" else 0)
        self.most = min(space // self.size * self.size, len(request.prompt) + request.max_tokens)
        self.text = [*request.prompt, *request.output]

    def run(self) -> Alone:
        size = self.size
        lo = len(self.text) // size * size
        self._commit(0, self.text[:lo])
        while not self._run_block(lo):
            self._commit(lo, self.block)
            lo += size
        return self.out

    def _commit(self, start: int, tokens: list[int]) -> None:
        if tokens:
            write_rows(self.kv.__getitem__, self.kv.__setitem__, self.size, start, tokens)

    def _run_block(self, lo: int) -> bool:
        """Fill the block at `lo` and emit of it. True: that was the end."""
        prompt = list(self.request.prompt[lo : lo + self.size])
        self.lo, self.known, self.step, self.end = lo, len(prompt), 0, self.size
        self.block = prompt + [self.mask] * (self.size - len(prompt))
        self.values: list[TokenLogprob | None] = [None] * self.size
        self.first_step, self.num_masks = 0, self.block.count(self.mask)
        self.opened = 0
        self.closed: int | None = None
        self.cached: tuple[int, int] | None = None
        self.num_full, settled = 0, False
        is_late = self.selector in ("edit", "wino")
        if self.model.shift and not prompt:
            self._step((lo, lo + 1), self.kv[lo - 1])
            self.first_step, self.num_masks = 1, self.size - 1
            if self._emit() if not is_late else False:
                return True
        while True:
            was_full = self.mask not in self.block[: self.end]
            edits = int(self.how.selector["max_post_edits"]) if self.selector == "edit" else 0
            if was_full and (settled or self.num_full >= edits):
                break
            changed = self._step(self._window(), None)
            self.num_full += was_full
            settled = was_full and not changed
            if not is_late and self._emit():
                return True
        if self.auto is not None:
            self.auto.forget_guesses()
        return self._emit() if is_late else False

    def _window(self) -> tuple[int, int]:
        masks = [i for i in range(self.end) if self.block[i] == self.mask]
        if not masks:
            return self.lo, self.lo + self.size
        if self._is_last(False):
            return self.lo, self.lo + self.end
        if self.how.planner.name == "adablock":
            stop = self.end if self.closed is None else min(self.closed, self.end)
            return self.lo + min(i for i in masks if i >= self.opened), self.lo + stop
        first, stop = plan_window(self.how.planner, self.block, self.mask, 0, self.end, self.known)
        return self.lo + first, self.lo + stop

    def _is_last(self, is_full: bool) -> bool:
        if self.selector == "wino":
            return self.step == 2 * self.size - 1 or self.step > 2 * self.size - 1
        if self.selector == "edit" and is_full:
            return self.num_full == int(self.how.selector["max_post_edits"]) - 1
        return self.step >= self.size - 1

    def _step(self, window: tuple[int, int], carried: int | None) -> bool:
        lo, size = self.lo, self.size
        kv = self._forward(window) if carried is None else carried
        num_steps = min(self.num_masks, self.how.steps or self.num_masks)
        at = self.step - self.first_step
        quota = 1 if carried is not None or at >= num_steps else self.num_masks // num_steps
        quota += carried is None and at < num_steps and at < self.num_masks % num_steps
        threshold = None if self.auto is None else self.auto.value
        is_full = self.mask not in self.block[: self.end]
        progress = min(at, max(1, num_steps) - 1) / max(1, num_steps)
        is_last = self._is_last(is_full)
        asked = Denoise(lo, lo + size, self.step, max(1, quota), window, progress, threshold, is_last)
        tokens, denoised = read_block(self.request, self.model, kv, asked, self.block, self.vocab_size)
        changes = dict(zip(denoised.positions, tokens, strict=True))
        for position, token in changes.items():
            value = denoise_logprob(kv, token)
            if position < len(self.text) and token != self.mask and self.selector not in ("edit", "wino"):
                changes[position] = token = self.text[position]
            self.block[position - lo], self.values[position - lo] = token, value
        self._note(changes, denoised)
        return bool(changes)

    def _forward(self, window: tuple[int, int]) -> int:
        """The hash of the block's KV, of which only the window is computed anew where the cache allows it."""
        first, stop = self.lo, self.lo + self.size
        if self.how.cache.name == "sub_block":
            if window == self.cached and not (self.model.shift and self.block[window[0] - self.lo] == self.mask):
                first, stop = window
            self.cached = window
        self._commit(first, self.block[first - self.lo : stop - self.lo])
        kv = self.kv[self.lo + self.size - 1]
        for position in range(self.lo, self.lo + self.size):
            kv = mix(kv, self.kv[position])
        return kv

    def _note(self, changes: dict[int, int], denoised: Denoised) -> None:
        self.step += 1
        self.out.num_steps += 1
        if self.auto is not None:
            self.auto.learn(changes, denoised.guesses)
        if denoised.end is not None:
            self.end = min(self.end, denoised.end - self.lo)
        if denoised.window_end is not None and self.closed is None:
            self.closed = denoised.window_end - self.lo
        if self.closed is not None and self.mask not in self.block[: self.closed]:
            self.opened, self.closed = self.closed, None

    def _emit(self) -> bool:
        """Append what is fixed behind the text. True: the text ends."""
        for offset in range(len(self.text) - self.lo, self.end):
            if self.block[offset] == self.mask:
                return False
            self.text.append(self.block[offset])
            self.out.tokens.append(self.block[offset])
            value = self.values[offset]
            if value is not None and self.request.sampling.logprobs is not None:
                self.out.logprobs.append(value)
            if self.block[offset] in self.request.stop_ids:
                self.out.reason = FinishReason.STOP
                return True
            if len(self.text) == self.most:
                return True
        if self.end < self.size:
            self.out.reason = FinishReason.STOP
            return True
        return False

"""A scheduler for block-causal requests, as small as can be: every sequence denoises in every step.

It knows spans and outcomes and nothing of how masks are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.types import Admission, Denoise, Outcome, Read, Request, Span, StepPlan
from server.worker.worker import Worker


@dataclass
class Sequence_:
    """One sequence: its tokens, masks included, up to the end of its block."""

    request: Request
    tokens: list[int]
    committed: int = 0
    step: int = 0
    masks: int = 0
    pages: int = 0
    forwards: int = 0
    passes: int = 0
    rows: int = 0
    fixed: list[int] = field(default_factory=list)
    window: tuple[int, int] | None = None
    threshold: float | None = None
    error: str | None = None
    end: int | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    logprobs: dict[int, float] = field(default_factory=dict)


class BlockDriver:
    """fused: a finished block's last pass rides with the next block's first step; chunk: of prefill, in tokens."""

    def __init__(self, worker: Worker, fused: bool = False, chunk: int = 1000, twice: bool = False) -> None:
        model = worker.info.diffusion
        assert model is not None
        self.worker, self.model, self.fused, self.chunk, self.twice = worker, model, fused, chunk, twice
        self.pages = list(range(worker.info.num_pages))
        self.step = 0
        self.next_id = 0

    @property
    def size(self) -> int:
        return self.model.block_size

    def generate(self, requests: Sequence[Request], others: Sequence[Span] = ()) -> list[Sequence_]:
        running: dict[int, Sequence_] = {}
        for request in requests:
            self.next_id += 1
            running[self.next_id] = Sequence_(request, list(request.prompt))
        found = list(running.values())
        while running:
            self._step(running)
            done = [seq_id for seq_id, one in running.items() if self._is_done(one)]
            for seq_id in done:
                del running[seq_id]
            self.step += 1
            self.worker.run(StepPlan(self.step, (), released=tuple(done)))
        return found

    def output(self, one: Sequence_) -> list[int]:
        num_prompt = len(one.request.prompt)
        return one.tokens[num_prompt : num_prompt + one.request.max_tokens]

    def _is_done(self, one: Sequence_) -> bool:
        is_full = self.model.mask_id not in one.tokens
        num_output = len(one.tokens) - len(one.request.prompt)
        if one.end is not None and self.model.mask_id not in one.tokens[: one.end]:
            return True
        return one.error is not None or (is_full and num_output >= one.request.max_tokens)

    def _step(self, running: dict[int, Sequence_]) -> None:
        spans, admitted, new_pages = [], [], []
        for seq_id, one in running.items():
            if one.pages == 0:
                admitted.append(Admission(seq_id, one.request, tuple(one.request.prompt)))
            span = self.next_span(seq_id, one)
            needed = -(-span.kv_len // self.worker.info.page_size) - one.pages
            if needed > 0:
                new_pages.append((seq_id, tuple(self.pages.pop() for _ in range(needed))))
                one.pages += needed
            spans.append(span)
        self.step += 1
        plan = StepPlan(self.step, tuple(spans), tuple(admitted), tuple(new_pages))
        result = self.worker.run(plan)
        if self.twice:
            assert self.worker.run(plan).outcomes == result.outcomes
        for span, outcome in zip(spans, result.outcomes, strict=True):
            self.absorb(running[span.seq_id], span, outcome)

    def next_span(self, seq_id: int, one: Sequence_) -> Span:
        size, mask_id = self.size, self.model.mask_id
        lo = len(one.tokens) // size * size
        has_block = mask_id in one.tokens
        if has_block:
            lo = len(one.tokens) - size
        clean = lo - one.committed
        is_prefill = one.committed + size < lo or (clean and not self.fused)
        if is_prefill or (self.model.shift and clean and not has_block):
            end = min(lo, one.committed + max(size, self.chunk // size * size))
            if self.model.shift and end == lo and len(one.tokens) == lo:
                one.tokens += [mask_id] * size
                return self._first_of_shifted(seq_id, one, lo)
            return Span(seq_id, tuple(one.tokens[one.committed : end]), one.committed, end, size)
        if not has_block:
            one.tokens += [mask_id] * (lo + size - len(one.tokens))
            one.masks, one.step = one.tokens.count(mask_id), 0
        return self.denoise_span(seq_id, one, lo)

    def _first_of_shifted(self, seq_id: int, one: Sequence_, lo: int) -> Span:
        size = self.size
        one.masks, one.step = size, 0
        clean = tuple(one.tokens[one.committed : lo])
        denoise = Denoise(lo, lo + size, 0, 1, (lo, lo + 1), state=tuple(one.tokens[lo:]))
        return Span(seq_id, clean, one.committed, lo, size, (len(clean) - 1,), Read.DENOISE, denoise=denoise)

    def denoise_span(self, seq_id: int, one: Sequence_, lo: int) -> Span:
        size, mask_id, shift = self.size, self.model.mask_id, self.model.shift
        decoding = one.request.decoding
        assert decoding is not None
        start, hi = one.committed, lo + size
        reads_all = decoding.selector.name in ("edit", "learn2pd", "wino")
        targets = [place for place in range(lo, hi) if one.tokens[place] == mask_id or reads_all]
        judged = tuple(target - shift - start for target in targets if target - shift >= start)
        steps = decoding.steps or one.masks
        quota = max(1, one.masks // steps + (one.step < one.masks % steps))
        first = one.tokens.index(mask_id) if mask_id in one.tokens else lo
        window = one.window or (first, hi)
        tokens = tuple(one.tokens[start:hi])
        shadow = size if decoding.selector.name == "wino" else 0
        if shadow:
            judged += tuple(range(len(tokens), len(tokens) + shadow))
            tokens += (mask_id,) * shadow
        denoise = Denoise(lo, hi, one.step, quota, window, threshold=one.threshold, shadow=shadow)
        return Span(seq_id, tokens, start, hi + shadow, size, judged, Read.DENOISE, denoise=denoise)

    def absorb(self, one: Sequence_, span: Span, outcome: Outcome) -> None:
        one.outcomes.append(outcome)
        one.rows += len(span.tokens)
        one.error = outcome.error
        if span.denoise is None:
            one.committed = span.kv_len
            one.passes += 1
            return
        if outcome.error is not None:
            return
        assert outcome.denoised is not None
        one.committed, one.step, one.forwards = span.denoise.lo, one.step + 1, one.forwards + 1
        one.fixed.append(len(outcome.tokens))
        for place, (position, token) in enumerate(zip(outcome.denoised.positions, outcome.tokens, strict=True)):
            one.tokens[position] = token
            if outcome.logprobs:
                one.logprobs[position] = outcome.logprobs[place].logprob
        one.window = None
        if outcome.denoised.window_end is not None:
            one.window = (span.denoise.window[0], outcome.denoised.window_end)
        one.end = one.end or outcome.denoised.end

"""A scheduler as small as can be: every sequence has a span in every step, whatever kind it is.

Autoregressive requests, block-causal and bidirectional ones; it knows spans and outcomes and nothing of how masks are
chosen. Pages are fresh for each sequence and never returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.types import MASK_ALL, Admission, Denoise, Outcome, Read, Request, Span, StepPlan
from server.worker.worker import Worker


@dataclass
class Running:
    """One sequence. tokens: masks included, up to the end of its block or canvas; rows, forwards, passes are counts."""

    request: Request
    tokens: list[int]
    committed: int = 0
    step: int = 0
    masks: int = 0
    pages: int = 0
    forwards: int = 0
    passes: int = 0
    rows: int = 0
    spans: list[Span] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    fixed: list[int] = field(default_factory=list)
    logprobs: dict[int, float] = field(default_factory=dict)
    window_end: int | None = None
    is_fresh: bool = True
    error: str | None = None
    end: int | None = None

    @property
    def output(self) -> list[int]:
        num_prompt = len(self.request.prompt)
        return self.tokens[num_prompt : num_prompt + self.request.max_tokens]


class BlockDriver:
    """fused: a finished block's last pass rides with the next block's first step; chunk: of prefill, in tokens.

    twice: every step is run a second time and must give the same; cache: of bidirectional requests, "none" or "dual"
    """

    def __init__(self, worker: Worker, fused: bool = False, chunk: int = 1000, twice: bool = False) -> None:
        model = worker.info.diffusion
        assert model is not None
        self.worker, self.fused, self.chunk, self.twice = worker, fused, chunk, twice
        self.size, self.mask_id, self.shift = model.block_size, model.mask_id, model.shift
        self.pages = list(range(worker.info.num_pages))
        self.step = self.next_id = 0
        self.threshold: float | None = None
        self.last_after: int | None = None
        self.post_edits = 0

    def generate(self, requests: Sequence[Request]) -> list[Running]:
        running: dict[int, Running] = {}
        for request in requests:
            self.next_id += 1
            running[self.next_id] = Running(request, list(request.prompt))
            if is_canvas(request):
                assert request.decoding is not None
                running[self.next_id].tokens += [self.mask_id] * (request.decoding.gen_length or 0)
        found = list(running.values())
        while running:
            self._run(running)
            done = [seq_id for seq_id, one in running.items() if self._is_done(one)]
            for seq_id in done:
                del running[seq_id]
            self.step += 1
            self.worker.run(StepPlan(self.step, (), released=tuple(done)))
            assert self.step < 2000
        return found

    def _is_done(self, one: Running) -> bool:
        if one.error is not None or (one.end is not None and self.mask_id not in one.tokens[: one.end]):
            return True
        is_full = self.mask_id not in one.tokens and one.step >= 0
        return is_full and len(one.tokens) - len(one.request.prompt) >= one.request.max_tokens

    def _run(self, running: dict[int, Running]) -> None:
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

    def next_span(self, seq_id: int, one: Running) -> Span:
        if one.request.decoding is None:
            return self._causal(seq_id, one)
        if is_canvas(one.request):
            return self._canvas(seq_id, one)
        size = self.size
        lo = len(one.tokens) // size * size
        has_block = self.mask_id in one.tokens or one.step < 0
        if has_block:
            lo = len(one.tokens) - size
        clean = lo - one.committed
        is_prefill = one.committed + size < lo or (clean and not self.fused)
        if not has_block and (is_prefill or (self.shift and clean)):
            end = min(lo, one.committed + max(size, self.chunk // size * size))
            if self.shift and end == lo == len(one.tokens):
                return self._first_of_shifted(seq_id, one, lo)
            return Span(seq_id, tuple(one.tokens[one.committed : end]), one.committed, end, size)
        if not has_block:
            one.tokens += [self.mask_id] * (lo + size - len(one.tokens))
            one.masks, one.step = one.tokens.count(self.mask_id), 0
        return self._block(seq_id, one, lo)

    def _causal(self, seq_id: int, one: Running) -> Span:
        end = min(len(one.tokens), one.committed + self.chunk)
        judged = (end - one.committed - 1,) if end == len(one.tokens) else ()
        read = Read.SAMPLE if judged else Read.NOTHING
        return Span(seq_id, tuple(one.tokens[one.committed : end]), one.committed, end, judged=judged, read=read)

    def _first_of_shifted(self, seq_id: int, one: Running, lo: int) -> Span:
        """The pass that makes a finished block final also decides the next block's first token."""
        one.tokens += [self.mask_id] * self.size
        one.masks, one.step = self.size, 0
        clean = tuple(one.tokens[one.committed : lo])
        denoise = Denoise(lo, lo + self.size, 0, 1, (lo, lo + 1), state=tuple(one.tokens[lo:]))
        return Span(seq_id, clean, one.committed, lo, self.size, (len(clean) - 1,), Read.DENOISE, denoise=denoise)

    def _denoise(self, one: Running, lo: int, hi: int) -> Denoise:
        """Windows begin at the first mask and end at the block's end, or where AdaBlock ended the last one."""
        decoding = one.request.decoding
        assert decoding is not None
        steps = decoding.steps or one.masks
        quota = max(1, one.masks // steps + (one.step < one.masks % steps))
        places = [at for at in range(lo, hi) if one.tokens[at] == self.mask_id]
        if one.window_end is None or not places or places[0] >= one.window_end:
            one.window_end = None
        window = (places[0] if places else lo, one.window_end or hi)
        is_last = self.last_after is not None and one.step >= self.last_after
        shadow = hi - lo if decoding.selector.name == "wino" else 0
        progress = one.step / max(1, one.masks)
        return Denoise(lo, hi, max(0, one.step), quota, window, progress, self.threshold, is_last, shadow)

    def _block(self, seq_id: int, one: Running, lo: int) -> Span:
        start, hi = one.committed, lo + self.size
        denoise = self._denoise(one, lo, hi)
        judged = tuple(
            target - self.shift - start for target in self._targets(one, lo, hi) if target - self.shift >= lo
        )
        if not self.shift:
            judged = tuple(target - start for target in self._targets(one, lo, hi))
        return self._with_shadows(Span(seq_id, tuple(one.tokens[start:hi]), start, hi, self.size, judged), denoise)

    def _canvas(self, seq_id: int, one: Running) -> Span:
        """Blocks from the end of the prompt on. `dual`: all rows in a block's first step, then the block's only."""
        decoding, num_prompt = one.request.decoding, len(one.request.prompt)
        assert decoding is not None
        size = decoding.block_size or self.size
        lo = num_prompt + (one.tokens.index(self.mask_id) - num_prompt) // size * size
        hi, length = lo + size, len(one.tokens)
        if all(token == self.mask_id for token in one.tokens[lo:hi]):
            one.masks, one.step = size, 0
        denoise = self._denoise(one, lo, hi)
        targets = self._targets(one, lo, hi)
        if decoding.cache.name == "dual" and one.step:
            at = tuple(range(lo - self.shift, hi))
            judged = tuple(at.index(target - self.shift) for target in targets)
            tokens = tuple(one.tokens[place] for place in at)
            return Span(seq_id, tokens, at[0], length, MASK_ALL, judged, Read.DENOISE, denoise=denoise, positions=at)
        judged = tuple(target - self.shift for target in targets)
        return self._with_shadows(Span(seq_id, tuple(one.tokens), 0, length, MASK_ALL, judged), denoise)

    def _targets(self, one: Running, lo: int, hi: int) -> list[int]:
        assert one.request.decoding is not None
        reads_all = one.request.decoding.selector.name in ("edit", "learn2pd", "wino")
        return [place for place in range(lo, hi) if one.tokens[place] == self.mask_id or reads_all]

    def _with_shadows(self, span: Span, denoise: Denoise) -> Span:
        count, length = denoise.shadow, len(span.tokens)
        return span._replace(
            tokens=span.tokens + (self.mask_id,) * count,
            kv_len=span.kv_len + count,
            judged=span.judged + tuple(range(length, length + count)),
            read=Read.DENOISE,
            denoise=denoise,
        )

    def absorb(self, one: Running, span: Span, outcome: Outcome) -> None:
        one.outcomes.append(outcome)
        one.spans.append(span)
        one.rows += len(span.tokens)
        one.error = outcome.error
        if span.denoise is None:
            one.committed = span.kv_len
            one.passes += span.read is Read.NOTHING
            one.tokens.extend(outcome.tokens)
            return
        if outcome.error is not None:
            return
        denoised = outcome.denoised
        assert denoised is not None
        one.committed = 0 if is_canvas(one.request) else span.denoise.lo
        one.forwards += 1
        one.fixed.append(len(outcome.tokens))
        for place, (position, token) in enumerate(zip(denoised.positions, outcome.tokens, strict=True)):
            one.tokens[position] = token
            if outcome.logprobs:
                one.logprobs[position] = outcome.logprobs[place].logprob
        if denoised.window_end is not None:
            one.window_end = denoised.window_end
        one.end = one.end or denoised.end
        one.step += 1
        self._go_on_editing(one, denoised.positions)

    def _go_on_editing(self, one: Running, changed: Sequence[int]) -> None:
        """A full block of LLaDA2.1 is edited until it rests; a negative step says so."""
        decoding = one.request.decoding
        assert decoding is not None
        if decoding.selector.name != "edit" or self.mask_id in one.tokens:
            return
        if one.step > 0:
            one.step = -int(decoding.selector["max_post_edits"])
        if not changed:
            one.step = 0


def is_canvas(request: Request) -> bool:
    return request.decoding is not None and request.decoding.gen_length is not None

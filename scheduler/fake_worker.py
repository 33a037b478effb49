"""A worker without a model: its "KV" is a hash of the tokens behind it, read back through the page tables.

The next token is a function of (seed, the hash at the last token), so the right text of a request is known without any
scheduler (`run_alone`), and every mistake with pages, chunks, hits or replays changes the text or raises. Used by the
simulator and by the tests of everything above the worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.types import (
    Admission,
    FinishReason,
    Outcome,
    Read,
    Request,
    Span,
    StepFeatures,
    StepPlan,
    TokenLogprob,
)

_MASK = (1 << 64) - 1
_EMPTY = 0x9E3779B97F4A7C15


def mix(state: int, value: int) -> int:
    """A 64-bit hash of `state` and `value` (the finaliser of splitmix64 over their combination)."""
    z = (state * 0x100000001B3 + value + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def next_token(request: Request, kv: int, vocab_size: int) -> int:
    """The token that follows the context whose hash is `kv`, for this request's seed and sample index."""
    sampling = request.sampling
    return mix(mix(kv, sampling.seed), sampling.sample_index) % vocab_size


def prompt_logprob(kv: int, token: int) -> TokenLogprob:
    """A number that only the right context gives."""
    return TokenLogprob(token=token, logprob=-(mix(kv, token) % 1000) / 100.0, rank=1)


def run_alone(
    request: Request, max_model_len: int, vocab_size: int
) -> tuple[tuple[int, ...], FinishReason, tuple[TokenLogprob, ...]]:
    """The oracle: new output tokens, finish reason and prompt logprobs of a request, computed without a scheduler."""
    kv = _EMPTY
    logprobs = []
    for index, token in enumerate(request.prompt):
        if index and request.sampling.prompt_logprobs is not None and not request.output:
            logprobs.append(prompt_logprob(kv, token))
        kv = mix(kv, token)
    for token in request.output:
        kv = mix(kv, token)
    new: list[int] = []
    while len(request.output) + len(new) < request.max_tokens:
        token = next_token(request, kv, vocab_size)
        new.append(token)
        kv = mix(kv, token)
        if token in request.stop_ids:
            return tuple(new), FinishReason.STOP, tuple(logprobs)
        if len(request.prompt) + len(request.output) + len(new) >= max_model_len:
            break
    return tuple(new), FinishReason.LENGTH, tuple(logprobs)


@dataclass(slots=True)
class _Known:
    """What the worker keeps of a sequence between steps."""

    request: Request
    tokens: list[int]
    pages: list[int] = field(default_factory=list)


class FakeWorker:
    """Executes plans on hashes.

    Raises AssertionError when a plan reads KV that was never written, or breaks the protocol.
    """

    def __init__(self, num_pages: int, page_size: int, vocab_size: int = 97) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self._kv: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self._known: dict[int, _Known] = {}
        self._last_seq_id = 0

    def run(self, plan: StepPlan) -> tuple[Outcome, ...]:
        """Outcomes of all spans, in order."""
        for seq_id in plan.released:
            assert self._known.pop(seq_id, None) is not None, f"sequence {seq_id} is released but not known"
        for admission in plan.admitted:
            self._admit(admission)
        for seq_id, pages in plan.new_pages:
            self._known[seq_id].pages.extend(pages)
        assert len({span.seq_id for span in plan.spans}) == len(plan.spans), "a sequence has two spans in a step"
        return tuple(self._run_span(span) for span in plan.spans)

    @property
    def num_known(self) -> int:
        return len(self._known)

    def request_of(self, seq_id: int) -> Request:
        return self._known[seq_id].request

    def _admit(self, admission: Admission) -> None:
        assert admission.seq_id > self._last_seq_id, f"seq_id {admission.seq_id} is used again"
        self._last_seq_id = admission.seq_id
        self._known[admission.seq_id] = _Known(admission.request, list(admission.tokens))

    def _read(self, known: _Known, index: int) -> int:
        if index < 0:
            return _EMPTY
        kv = self._kv[known.pages[index // self.page_size]][index % self.page_size]
        assert kv is not None, f"KV index {index} is read but was never written"
        return kv

    def _run_span(self, span: Span) -> Outcome:
        known = self._known[span.seq_id]
        assert span.kv_len == span.start + len(span.tokens), "a causal span ends where its tokens end"
        assert tuple(known.tokens[span.start : span.kv_len]) == span.tokens, "the span's tokens are not the sequence's"
        for index, token in enumerate(span.tokens, span.start):
            page = self._kv[known.pages[index // self.page_size]]
            page[index % self.page_size] = mix(self._read(known, index - 1), token)
        tokens: list[int] = []
        logprobs = []
        assert (span.read is Read.SAMPLE) == bool(span.judged), "rows are judged exactly when they are read"
        for row in span.judged:
            index = span.start + row
            kv = self._read(known, index)
            if index + 1 < len(known.tokens):
                assert index + 1 < len(known.request.prompt), "an output row is judged again"
                logprobs.append(prompt_logprob(kv, known.tokens[index + 1]))
            else:
                tokens.append(next_token(known.request, kv, self.vocab_size))
        known.tokens.extend(tokens)
        return Outcome(span.seq_id, tuple(tokens), prompt_logprobs=tuple(logprobs))


def features_of(plan: StepPlan) -> StepFeatures:
    """The features of a plan, from its spans alone (a span of one judged row is a decode)."""
    decodes = [span for span in plan.spans if len(span.tokens) == 1 and span.judged]
    prefills = [span for span in plan.spans if not (len(span.tokens) == 1 and span.judged)]
    rows = sum(len(span.tokens) for span in prefills)
    context = sum(len(s.tokens) * s.start + len(s.tokens) * (len(s.tokens) + 1) // 2 for s in prefills)
    return StepFeatures(len(decodes) + rows, rows, len(decodes), sum(span.kv_len for span in decodes), context)

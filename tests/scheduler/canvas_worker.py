"""A bidirectional model made of hashes: two layers of "keys" per row, so that a stale key changes what is chosen.

Row i of layer 1 is a hash of its token, of layer 2 one of that and of all layer-1 keys as they stand; the choice for a
position looks at all layer-2 keys. A step that computes all rows is therefore a function of the canvas alone, and one
that does not remembers. Written against the protocol of spans, with selectors of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from scheduler.decoding.full_diffusion import FullDiffusion
from scheduler.hashing import mix
from scheduler.policies import make_diffusion
from scheduler.sequence import Sequence
from scheduler.types import (
    MASK_ALL,
    Denoised,
    Diffusion,
    DiffusionModel,
    Outcome,
    Read,
    Request,
    Sampling,
    Span,
    TokenLogprob,
    Topology,
)

MASK = 0
VOCAB = 19


def model(block_size: int = 4, shift: int = 0) -> DiffusionModel:
    return DiffusionModel(MASK, block_size, Topology.BIDIRECTIONAL, shift)


def diffusion(policy: str = "low_confidence", cache: str = "none", **others: object) -> Diffusion:
    parts = {"cache": cache} | {key: str(others.pop(key)) for key in ("planner", "stopper") if key in others}
    values = others.pop("values", None)
    return make_diffusion(policy, Topology.BIDIRECTIONAL, parts, values, **others)  # type: ignore[arg-type]


def request(asked: Diffusion, prompt: int = 5, max_tokens: int = 10, **others: object) -> Request:
    seed = int(str(others.pop("seed", 3)))
    sampling = Sampling(seed=seed, logprobs=0)
    return Request("r", tuple(range(1, prompt + 1)), max_tokens, sampling, decoding=asked, **others)  # type: ignore[arg-type]


def digest(values: list[int]) -> int:
    state = 1
    for value in values:
        state = mix(state, value)
    return state


@dataclass
class Keys:
    """Keys of one sequence; None = never written since its pages were taken."""

    first: list[int | None] = field(default_factory=list)
    second: list[int | None] = field(default_factory=list)

    def run(self, span: Span) -> int:
        """Write the span's rows; returns what every judged row sees."""
        assert span.mask_block == MASK_ALL
        size = span.kv_len
        for layer in (self.first, self.second):
            layer.extend([None] * (size - len(layer)))
        rows = span.positions or tuple(range(span.start, span.start + len(span.tokens)))
        assert list(rows) == sorted(set(rows)), "rows ascend"
        assert len(rows) == len(span.tokens), "a token for each row"
        for row, token in zip(rows, span.tokens, strict=True):
            self.first[row] = mix(token, row)
        seen = digest(self._written(self.first, size))
        for row in rows:
            own = self.first[row]
            assert own is not None
            self.second[row] = mix(own, seen)
        return digest(self._written(self.second, size))

    @staticmethod
    def _written(layer: list[int | None], size: int) -> list[int]:
        values = layer[:size]
        assert None not in values, "a key is read that was never written"
        return [value for value in values if value is not None]


def choose(context: int, position: int, request: Request) -> tuple[int, float]:
    """(token, confidence) of a position; never the mask."""
    drawn = mix(mix(context, position), request.sampling.seed)
    return 1 + drawn % (VOCAB - 1), mix(drawn, 7) % 1000 / 1000


def logprob(context: int, position: int, token: int) -> TokenLogprob:
    return TokenLogprob(token, -(mix(mix(context, position), token) % 1000) / 100, 1)


def read(span: Span, request: Request, context: int, shift: int) -> Outcome:
    """What a span's judged rows change: its quota's surest, or all surer than the threshold and the surest."""
    denoise = span.denoise
    assert denoise is not None
    assert span.read is Read.DENOISE
    state = denoise.state or span.tokens[denoise.lo - span.start : denoise.hi - span.start]
    rows = span.positions or tuple(range(span.start, span.start + len(span.tokens)))
    guesses = {}
    for offset in span.judged:
        position = rows[offset] + shift
        assert denoise.lo <= position < denoise.hi, "a judged row answers for no position of the canvas"
        if state[position - denoise.lo] == MASK:
            guesses[position] = choose(context, position, request)
    first, end = denoise.window
    inside = sorted((p for p in guesses if first <= p < end), key=lambda p: (-guesses[p][1], p))
    assert inside, "nothing can be fixed"
    asked = request.decoding
    assert asked is not None
    if asked.selector.name == "threshold":
        count = max(1, sum(guesses[p][1] >= asked.selector["threshold"] for p in inside))
    else:
        count = denoise.quota
    fixed = sorted(inside[:count])
    tokens = tuple(guesses[p][0] for p in fixed)
    wants = request.sampling.logprobs is not None
    logprobs = tuple(logprob(context, p, t) for p, t in zip(fixed, tokens, strict=True)) if wants else ()
    is_stale, tracked = drift(context, span) if asked.cache.name == "elastic" else (False, ())
    return Outcome(span.seq_id, tokens, logprobs, denoised=Denoised(tuple(fixed), None, None, is_stale, tracked))


def drift(context: int, span: Span) -> tuple[bool, tuple[int, ...]]:
    """(is_stale, tracked) of an elastic span, as a hash says: never stale where all rows were computed."""
    assert span.denoise is not None
    word = mix(context, digest(list(span.tokens)))
    is_full = len(span.tokens) == span.kv_len
    return not is_full and word % 3 == 0, (word % span.denoise.lo,)


@dataclass
class Run:
    """One request driven by itself: its spans, its deltas' tokens, and what became of it."""

    request: Request
    diffusion: DiffusionModel = field(default_factory=model)
    max_model_len: int = 64

    def __post_init__(self) -> None:
        self.seq = Sequence(self.request, (0, 1), 0.0, [*self.request.prompt, *self.request.output])
        self.machine = FullDiffusion(self.seq, self.max_model_len, self.diffusion)
        self.seq.seq_id = 1
        self.keys = Keys()
        self.spans: list[Span] = []
        self.emitted: list[tuple[int, ...]] = []
        self.logprobs: list[TokenLogprob] = []
        self.forwards = self.rows = 0

    def step(self) -> Outcome:
        span = self.machine.next_span(1)
        assert span == self.machine.next_span(1), "asking changes nothing"
        assert self.machine.widths == (len(span.tokens), len(span.tokens))
        outcome = read(span, self.request, self.keys.run(span), self.diffusion.shift)
        self.take(span, outcome)
        return outcome

    def take(self, span: Span, outcome: Outcome) -> None:
        news = self.machine.absorb(span, outcome)
        self.spans.append(span)
        self.emitted.append(news.tokens)
        self.logprobs.extend(news.logprobs)
        if news.decoding is not None:
            self.forwards += news.decoding.forwards
            self.rows += news.decoding.rows

    def preempt(self) -> None:
        self.machine.restart()
        self.keys = Keys()
        self.seq.seq_id += 1

    def finish(self) -> Run:
        for _ in range(1000):
            if self.seq.finish_reason is not None:
                return self
            self.step()
        raise AssertionError("the request does not end")

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for tokens in self.emitted for token in tokens)


def with_output(request: Request, tokens: tuple[int, ...]) -> Request:
    return replace(request, output=tokens)

"""A worker without a model: its "KV" is a hash of the tokens behind it, read back through the page tables.

The next token is a function of (seed, the hash at the last token), so the right text of a request is known without any
scheduler (`run_alone`), and every mistake with pages, chunks, hits, replays or drafts changes the text or raises. Used
by the simulator and by the tests of everything above the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from scheduler.attention import ALL_DENSE, leaves_keys_out
from scheduler.fake_denoiser import run_block_span
from scheduler.hashing import EMPTY, mix
from scheduler.types import (
    UNKNOWN,
    Admission,
    DiffusionModel,
    Drafts,
    FinishReason,
    Outcome,
    Read,
    Request,
    Span,
    StepFeatures,
    StepPlan,
    TokenLogprob,
)


def row_kv(before: int, token: int, is_sparse: bool) -> int:
    """The KV of a row behind `before`; a sparse one leaves its mark on all that follow it, until it is corrected."""
    return mix(mix(before, token), 1) if is_sparse else mix(before, token)


def context_kv(request: Request, tokens: Sequence[int]) -> int:
    """The KV of the last of `tokens`, the first ones of the request, when nothing is left to correct behind it."""
    attention, kv = request.attention, EMPTY
    dense_end = ALL_DENSE
    if attention is not None and not attention.lossless:
        dense_end = attention.dense_end(len(request.prompt), len(tokens))
    for index, token in enumerate(tokens):
        kv = row_kv(kv, token, index >= dense_end)
    return kv


def next_token(request: Request, kv: int, vocab_size: int) -> int:
    """The token that follows the context whose hash is `kv`, for this request's seed and sample index."""
    sampling = request.sampling
    return mix(mix(kv, sampling.seed), sampling.sample_index) % vocab_size


def token_logprob(kv: int, token: int) -> TokenLogprob:
    """A number that only the right context gives."""
    return TokenLogprob(token=token, logprob=-(mix(kv, token) % 1000) / 100.0, rank=1)


def run_alone(
    request: Request, max_model_len: int, vocab_size: int
) -> tuple[tuple[int, ...], FinishReason, tuple[TokenLogprob, ...]]:
    """The oracle: new output tokens, finish reason and prompt logprobs of a request, computed without a scheduler."""
    kv = EMPTY
    logprobs = []
    for index, token in enumerate(request.prompt):
        if index and request.sampling.prompt_logprobs is not None and not request.output:
            logprobs.append(token_logprob(kv, token))
        kv = mix(kv, token)
    tokens = [*request.prompt, *request.output]
    kv = context_kv(request, tokens)
    new: list[int] = []
    while len(request.output) + len(new) < request.max_tokens:
        token = next_token(request, kv, vocab_size)
        new.append(token)
        tokens.append(token)
        kv = mix(kv, token) if request.attention is None else context_kv(request, tokens)
        if token in request.stop_ids:
            return tuple(new), FinishReason.STOP, tuple(logprobs)
        if len(request.prompt) + len(request.output) + len(new) >= max_model_len:
            break
    return tuple(new), FinishReason.LENGTH, tuple(logprobs)


def output_logprobs(request: Request, tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    """The oracle's logprobs of new output `tokens`, if the request asks for any."""
    if request.sampling.logprobs is None:
        return ()
    known = [*request.prompt, *request.output]
    kv = context_kv(request, known)
    logprobs = []
    for token in tokens:
        logprobs.append(token_logprob(kv, token))
        known.append(token)
        kv = mix(kv, token) if request.attention is None else context_kv(request, known)
    return tuple(logprobs)


@dataclass(slots=True)
class Known:
    """What the worker keeps of a sequence between steps."""

    request: Request
    tokens: list[int]
    pages: list[int] = field(default_factory=list)


Truth = Callable[[int], tuple[int, ...]]
"""The next n tokens of a sequence, if nothing stops it."""

FakeDrafter = Callable[[Known, int, Truth], Drafts | None]
"""(sequence, most drafts, truth) -> an offer: right or wrong, as its author likes."""


class FakeWorker:
    """Executes plans on hashes.

    drafter    asked for every span with num_drafts > 0
    diffusion  how its model denoises; None = it cannot
    Raises AssertionError when a plan reads KV that was never written, or breaks the protocol.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        vocab_size: int = 97,
        drafter: FakeDrafter | None = None,
        diffusion: DiffusionModel | None = None,
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self._drafter = drafter
        self._diffusion = diffusion
        self._kv: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self._known: dict[int, Known] = {}
        self._last_seq_id = 0

    def run(self, plan: StepPlan) -> tuple[Outcome, ...]:
        """Outcomes of all spans, in order."""
        for seq_id in plan.released:
            assert self._known.pop(seq_id, None) is not None, f"sequence {seq_id} is released but not known"
        for admission in plan.admitted:
            self._admit(admission)
        assert len(dict(plan.new_pages)) == len(plan.new_pages), "a sequence's pages come in one entry"
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
        self._known[admission.seq_id] = Known(admission.request, list(admission.tokens))

    def _read(self, known: Known, index: int) -> int:
        if index < 0:
            return EMPTY
        kv = self._kv[known.pages[index // self.page_size]][index % self.page_size]
        assert kv is not None, f"KV index {index} is read but was never written"
        return kv

    def _write(self, known: Known, index: int, kv: int) -> None:
        self._kv[known.pages[index // self.page_size]][index % self.page_size] = kv

    def _run_span(self, span: Span) -> Outcome:
        known = self._known[span.seq_id]
        if span.tokens == (UNKNOWN,):
            span = span._replace(tokens=(known.tokens[span.start],))
        if known.request.decoding is not None:
            assert self._diffusion is not None, "a model that cannot denoise is asked to"
            read, write = partial(self._read, known), partial(self._write, known)
            return run_block_span(known.request, self._diffusion, read, write, span, self.vocab_size)
        assert span.mask_block == 1, "an autoregressive span is not causal"
        assert span.kv_len == span.start + len(span.tokens), "a span ends where its tokens end"
        capacity = len(known.pages) * self.page_size
        assert span.kv_len + span.num_drafts <= capacity, "the drafts that are wanted have no pages"
        if span.read is Read.VERIFY:
            tokens, logprobs = self._verify(known, span)
            prompt_logprobs: list[TokenLogprob] = []
        else:
            tokens, logprobs, prompt_logprobs = self._judge(known, span)
        known.tokens.extend(tokens)
        wants_logprobs = known.request.sampling.logprobs is not None
        return Outcome(
            span.seq_id,
            tuple(tokens),
            tuple(logprobs) if wants_logprobs else (),
            tuple(prompt_logprobs),
            drafts=self._draft(known, span.num_drafts),
        )

    def _judge(self, known: Known, span: Span) -> tuple[list[int], list[TokenLogprob], list[TokenLogprob]]:
        """Tokens, their logprobs, prompt logprobs of a chunk or of a plain decode."""
        assert tuple(known.tokens[span.start : span.kv_len]) == span.tokens, "the span's tokens are not the sequence's"
        for index, token in enumerate(span.tokens, span.start):
            is_sparse = _is_sparse(known.request, span, index)
            self._write(known, index, row_kv(self._read(known, index - 1), token, is_sparse))
        tokens: list[int] = []
        logprobs, prompt_logprobs = [], []
        assert (span.read is Read.SAMPLE) == bool(span.judged), "rows are judged exactly when they are read"
        for row in span.judged:
            index = span.start + row
            kv = self._read(known, index)
            if index + 1 < len(known.tokens):
                assert index + 1 < len(known.request.prompt), "an output row is judged again"
                prompt_logprobs.append(token_logprob(kv, known.tokens[index + 1]))
            else:
                tokens.append(next_token(known.request, kv, self.vocab_size))
                logprobs.append(token_logprob(kv, tokens[-1]))
        return tokens, logprobs, prompt_logprobs

    def _verify(self, known: Known, span: Span) -> tuple[list[int], list[TokenLogprob]]:
        """Coupled verification of a chain or a tree; the accepted path's KV is moved into place."""
        start, rows = span.start, len(span.tokens)
        assert (start, span.tokens[0]) == (len(known.tokens) - 1, known.tokens[-1]), "drafts follow the last token"
        assert span.judged == tuple(range(rows)), "every row of a verify span is judged"
        assert rows > 1, "a verify span without drafts is a plain decode"
        parents = span.parents or tuple(range(-1, rows - 1))
        assert len(parents) == rows, "a parent for each token"
        assert parents[0] == -1, "the first token is the root"
        assert all(0 <= parent < row for row, parent in enumerate(parents[1:], 1)), "parents come before children"
        hashes: list[int] = []
        for row, (token, parent) in enumerate(zip(span.tokens, parents, strict=True)):
            before = hashes[parent] if row else self._read(known, start - 1)
            hashes.append(row_kv(before, token, _is_sparse(known.request, span, start + row)))
            self._write(known, start + row, hashes[row])
        tokens, logprobs, node = [], [], 0
        while True:
            tokens.append(next_token(known.request, hashes[node], self.vocab_size))
            logprobs.append(token_logprob(hashes[node], tokens[-1]))
            children = (row for row in range(1, rows) if parents[row] == node and span.tokens[row] == tokens[-1])
            node = next(children, 0)
            if node == 0:
                return tokens, logprobs
            self._write(known, start + len(tokens), hashes[node])

    def _draft(self, known: Known, num_drafts: int) -> Drafts | None:
        if not num_drafts or self._drafter is None:
            return None

        def truth(count: int) -> tuple[int, ...]:
            kv = self._read(known, len(known.tokens) - 2)
            tokens = [known.tokens[-1]]
            for _ in range(count):
                kv = row_kv(kv, tokens[-1], leaves_keys_out(known.request.attention))
                tokens.append(next_token(known.request, kv, self.vocab_size))
            return tuple(tokens[1:])

        return self._drafter(known, num_drafts, truth)


def _is_sparse(request: Request, span: Span, index: int) -> bool:
    return leaves_keys_out(request.attention) and index >= max(len(request.prompt), span.dense_end)


def features_of(plan: StepPlan) -> StepFeatures:
    """The features of a plan, from its spans alone: one that verifies, denoises or has a single judged row decodes."""
    wide = (Read.VERIFY, Read.DENOISE)
    verified = [span for span in plan.spans if span.read in wide]
    decodes = [span for span in plan.spans if _is_decode(span)]
    prefills = [span for span in plan.spans if span.read not in wide and not _is_decode(span)]
    rows = sum(len(span.tokens) for span in prefills)
    context = sum(len(s.tokens) * s.start + len(s.tokens) * (len(s.tokens) + 1) // 2 for s in prefills)
    return StepFeatures(
        tokens=plan.num_tokens,
        prefill_tokens=rows,
        decode_seqs=len(decodes) + len(verified),
        context_tokens=sum(span.kv_len for span in (*decodes, *verified)),
        prefill_context=context,
        judged=sum(len(span.judged) - 1 for span in verified) + sum(len(span.judged) for span in prefills),
        draft_context=sum((len(span.tokens) - 1) * span.kv_len for span in verified),
    )


def _is_decode(span: Span) -> bool:
    return len(span.tokens) == 1 and bool(span.judged)

"""The worker: all tensors live here. `run(plan)` is one step: apply the plan's differences, forward, read, answer.

A step is transactional (R-03): everything it changes before its answer is a function of the plan and of positions, so
running the same plan again, whole or with some of its spans, gives what the first run would have given.
Not here: which spans a step has (the scheduler), what a token means (the front end).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from kernels.ops import AttentionRows, Ops
from scheduler.types import Admission, Outcome, Read, Request, Span, StepPlan, StepResult, StepSample, TokenLogprob
from server.worker.batch import Batch, build_batch
from server.worker.grammar import GrammarCompiler
from server.worker.kv_pool import KVPool, pages_for
from server.worker.logprobs import token_logprobs
from server.worker.process_logits import JudgedRow
from server.worker.profile import measure_steps
from server.worker.recipe import make_recipe
from server.worker.sampling import NOT_FINITE, Reading, not_finite, sample_rows
from server.worker.sequences import SequenceState, SequenceTable, TokenCounts

LOGITS_BYTES = 64 << 20
"""Most bytes of float32 logits held at once; sampling and log-probabilities may need four times this while they run."""
# VERIFY and DENOISE join here with their readers (verification.py, denoising.py).
READABLE = frozenset({Read.NOTHING, Read.SAMPLE})
_T = TypeVar("_T")


class ForwardModel(Protocol):
    """What the worker asks of a model."""

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states [T, H] of every row, final norm applied; K and V of the rows are in `kv` afterwards."""
        ...

    def logits(self, hidden_JH: Tensor) -> Tensor:
        """Float32 [J, V], in memory of its own: the caller writes over it."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The facts of a built worker. Lengths in tokens, sizes in bytes.

    model_len             longest sequence, prompt and output
    block_size, mask_id   of a block-diffusion model, else None
    """

    model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    weight_bytes: int
    kv_bytes: int
    dtype: str
    device: str
    ops: str
    eos_ids: tuple[int, ...]
    block_size: int | None
    mask_id: int | None
    num_parameters: int


@dataclass(slots=True)
class _Answer:
    """What a span has given so far."""

    reading: Reading | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    error: str | None = None


class Worker:
    """Runs steps of one model on one device."""

    def __init__(
        self,
        model: ForwardModel,
        ops: Ops,
        pool: KVPool,
        grammars: GrammarCompiler,
        info: WorkerInfo,
        max_seqs: int,
        max_batched_tokens: int,
        device: torch.device,
        logits_bytes: int = LOGITS_BYTES,
    ) -> None:
        self.info = info
        self._model, self._ops, self._pool, self._grammars, self._device = model, ops, pool, grammars, device
        self._max_seqs, self._max_batched_tokens = max_seqs, max_batched_tokens
        self._rows_at_once = max(1, logits_bytes // (4 * info.vocab_size))
        # One page more than the longest sequence: a block of a diffusion model may end past it.
        max_pages = pages_for(info.model_len, info.page_size) + 1
        self._sequences = SequenceTable(max_seqs, max_pages, info.num_pages, info.page_size)

    def prepare(self, request: Request) -> None:
        """Compile what the request needs before it is scheduled (its grammar). May be slow: call it off the loop.

        Raises ValueError with a sentence for the user.
        """
        self._grammars.prepare(request)

    def forget(self, request_id: str) -> None:
        """Drop what `prepare` made. Idempotent."""
        self._grammars.forget(request_id)

    def profile(self) -> list[StepSample]:
        """Warm up and time a few sizes of step on the empty pool. Only before the first request."""
        if len(self._sequences):
            raise ValueError("the worker is profiled before it serves: a profile writes over the KV pages")
        return measure_steps(self.run, self.info, self._max_seqs, self._max_batched_tokens)

    def run(self, plan: StepPlan) -> StepResult:
        """Execute a step; outcomes are in span order.

        Raises ValueError for a plan that breaks the rules of `scheduler.types`, and whatever the forward pass raises;
        in either case the step may be run again, with all or some of its spans.
        """
        started_at = time.perf_counter()
        for span in plan.spans:
            if span.read not in READABLE:
                raise ValueError(f"span of sequence {span.seq_id} asks for {span.read.name}, which has no reader")
        self._sequences.apply(plan, self._make_state)
        outcomes: tuple[Outcome, ...] = ()
        if plan.spans:
            with torch.inference_mode():
                outcomes = self._step(plan.spans)
        return StepResult(plan.step, outcomes, time.perf_counter() - started_at)

    def _make_state(self, admission: Admission, slot: int, step: int) -> SequenceState:
        request = admission.request
        recipe = make_recipe(request, self.info.eos_ids)
        state = SequenceState(request, recipe, slot, list(admission.tokens), step)
        sampling = request.sampling
        if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0):
            state.counts = TokenCounts(request.prompt, with_prompt=recipe.counts_prompt)
        try:
            state.matcher = self._grammars.matcher(request)
        except ValueError as error:
            state.failure = str(error)
        return state

    def _step(self, spans: Sequence[Span]) -> tuple[Outcome, ...]:
        states = [self._sequences[span.seq_id] for span in spans]
        batch = build_batch(spans, states, self._sequences.page_table, self.info.page_size, self._device)
        for span, state in zip(spans, states, strict=True):
            state.put(span)
        hidden_TH = self._model.forward(batch.tokens, batch.rows, self._pool.layers)
        answers = [_Answer(error=state.failure) for state in states]
        self._read_prompts(hidden_TH, spans, states, batch, answers)
        self._read_samples(hidden_TH, spans, states, batch, answers)
        return tuple(_outcome(span.seq_id, answer) for span, answer in zip(spans, answers, strict=True))

    def _read_samples(
        self,
        hidden_TH: Tensor,
        spans: Sequence[Span],
        states: Sequence[SequenceState],
        batch: Batch,
        answers: Sequence[_Answer],
    ) -> None:
        """Sample the row of the last known token of each SAMPLE span that has it among its judged rows."""
        found: list[tuple[int, int]] = []
        rows: list[JudgedRow] = []
        for index, (span, state) in enumerate(zip(spans, states, strict=True)):
            if span.read is not Read.SAMPLE or not span.judged:
                continue
            offset = len(state.history) - 1 - span.start
            if offset != span.judged[-1] or answers[index].error is not None:
                continue
            row, error = _judged_row(state)
            if error is not None:
                answers[index].error = error
                continue
            found.append((index, batch.first_rows[index] + offset))
            rows.append(row)
        taken = iter(rows)
        for part in _chunks(found, self._rows_at_once):
            logits_JV = self._logits(hidden_TH, [row for _, row in part])
            for (index, _), reading in zip(
                part, sample_rows(self._ops, logits_JV, list(islice(taken, len(part)))), strict=True
            ):
                answers[index].reading = reading

    def _read_prompts(
        self,
        hidden_TH: Tensor,
        spans: Sequence[Span],
        states: Sequence[SequenceState],
        batch: Batch,
        answers: Sequence[_Answer],
    ) -> None:
        """Log-probability of the token after each judged row of a prompt."""
        found: list[tuple[int, int, int]] = []
        for index, (span, state) in enumerate(zip(spans, states, strict=True)):
            if state.request.sampling.prompt_logprobs is None or span.read is Read.NOTHING:
                continue
            targets = ((offset, span.start + offset + 1) for offset in span.judged)
            first = batch.first_rows[index]
            found += [(index, first + offset, state.history[at]) for offset, at in targets if at < state.num_prompt]
        for part in _chunks(found, self._rows_at_once):
            logits_JV = self._logits(hidden_TH, [row for _, row, _ in part])
            bad = not_finite(logits_JV)
            tokens = torch.tensor([token for _, _, token in part], device=self._device)
            num_top = [states[index].request.sampling.prompt_logprobs or 0 for index, _, _ in part]
            logprobs = token_logprobs(torch.log_softmax(logits_JV, dim=1), tokens, num_top)
            for place, ((index, _, _), logprob) in enumerate(zip(part, logprobs, strict=True)):
                answers[index].prompt_logprobs.append(logprob)
                if place in bad:
                    answers[index].error = NOT_FINITE

    def _logits(self, hidden_TH: Tensor, rows: list[int]) -> Tensor:
        if len(rows) == hidden_TH.shape[0]:
            return self._model.logits(hidden_TH)
        return self._model.logits(hidden_TH[torch.tensor(rows, device=self._device)])


def _judged_row(state: SequenceState) -> tuple[JudgedRow, str | None]:
    """The row that decides a sequence's next token, its counts and matcher brought up to its history."""
    if state.counts is not None:
        state.counts.catch_up(state.history)
    error = state.matcher.catch_up(state.history) if state.matcher is not None else None
    num_output = len(state.history) - state.num_prompt
    return JudgedRow(state.recipe, state.history, num_output, state.counts, state.matcher), error


def _chunks(items: Sequence[_T], size: int) -> Iterable[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _outcome(seq_id: int, answer: _Answer) -> Outcome:
    reading = answer.reading
    error = answer.error or (reading.error if reading is not None else None)
    if error is not None:
        return Outcome(seq_id, error=error)
    prompt_logprobs = tuple(answer.prompt_logprobs)
    if reading is None:
        return Outcome(seq_id, prompt_logprobs=prompt_logprobs)
    logprobs = () if reading.logprob is None else (reading.logprob,)
    return Outcome(seq_id, (reading.token,), logprobs, prompt_logprobs)

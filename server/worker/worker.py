"""The worker: all tensors live here. `run(plan)` is one step: apply the plan's differences, forward, read, answer.

A step is transactional (R-03): everything it changes before its answer is a function of the plan and of positions, so
running the same plan again, whole or with some of its spans, gives what the first run would have given.
Not here: which spans a step has (the scheduler), what a token means (the front end).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import (
    Admission,
    Drafts,
    Outcome,
    Read,
    Request,
    Span,
    StepPlan,
    StepResult,
    StepSample,
)
from server.worker.ahead import TokensAhead, can_choose_early, forget_unknown
from server.worker.attention_probe import AttentionProbe
from server.worker.batch import Batch, HostBatch, host_batch
from server.worker.batch import place as place_batch
from server.worker.denoising.learn2pd import Filter
from server.worker.denoising.reader import DenoiseReader
from server.worker.forward import ForwardModel as ForwardModel
from server.worker.grammar import GrammarCompiler
from server.worker.info import WorkerInfo as WorkerInfo
from server.worker.judged import embedded
from server.worker.kv_pool import KVPool
from server.worker.probes import Probe, Prober, beside, states_of
from server.worker.profile import ProfileMemory, measure_steps
from server.worker.prompt_logprobs import read_prompts
from server.worker.proposals import Proposer, propose
from server.worker.reader import Part, TokenReader
from server.worker.recipe import Feature, make_recipe
from server.worker.sampling import NOT_FINITE, Reading, outcome_of
from server.worker.sequences import SequenceState, SequenceTable, TokenCounts
from server.worker.sparse_batch import place_sparse
from server.worker.transfer import upload

LOGITS_BYTES = 64 << 20
"""Most bytes of float32 logits held at once; sampling and log-probabilities may need four times this while they run."""


class _Begun(NamedTuple):
    """A step whose forward is under way: its spans and probes, their rows and hidden states [rows, H].

    num_compiled  kernels that had been compiled before it
    errors        {index of a span: message} so far
    parts         the tokens that were chosen early; then nothing else is read of the step
    """

    plan: StepPlan
    started_at: float
    num_compiled: int
    errors: dict[int, str]
    states: Sequence[SequenceState] = ()
    probes: Sequence[Probe] = ()
    batch: Batch | None = None
    hidden_TH: Tensor | None = None
    parts: list[Part] | None = None


class Worker:
    """Runs steps of one model on one device."""

    def __init__(
        self,
        model: ForwardModel,
        ops: Ops,
        pool: KVPool,
        sequences: SequenceTable,
        grammars: GrammarCompiler,
        info: WorkerInfo,
        max_seqs: int,
        max_batched_tokens: int,
        device: torch.device,
        logits_bytes: int = LOGITS_BYTES,
        speculator: Proposer | None = None,
        profile_memory: ProfileMemory | None = None,
        prober: Prober | None = None,
        learnt: Filter | None = None,
        attention: AttentionProbe | None = None,
        place: Callable[[HostBatch], Batch] | None = None,
        num_compiled: Callable[[], int] | None = None,
        plans_ahead: bool = False,
    ) -> None:
        """plans_ahead: a step may be launched before the one before it is finished (`StepPlan.after`)."""
        self.info, self._prober, self._attention = info, prober, attention
        self._sequences, self._speculator, self._profile_memory = sequences, speculator, profile_memory
        self._model, self._ops, self._pool, self._grammars, self._device = model, ops, pool, grammars, device
        self._max_seqs, self._max_batched_tokens = max_seqs, max_batched_tokens
        self._rows_at_once = max(1, logits_bytes // (4 * info.vocab_size))
        self._reader = TokenReader(ops, info.vocab_size, self._rows_at_once)
        self.plans_ahead, self._ahead = plans_ahead, TokensAhead()
        # A CPU that is to follow steps ahead does in `launch` what a device would do beside the host.
        self.is_asynchronous = device.type != "cpu" or plans_ahead
        self._finished_at, self._num_seen = 0.0, 0
        self._place = place or partial(place_batch, device=device, layers=pool.metadata)
        self._num_compiled = num_compiled or (lambda: 0)
        diffusion, rows = info.diffusion, self._rows_at_once
        self._denoiser = None if diffusion is None else DenoiseReader(ops, diffusion, rows, learnt)

    def prepare(self, request: Request) -> None:
        """Compile what the request needs before it is scheduled (its grammar). May be slow: call it off the loop.

        Raises ValueError with a sentence for the user.
        """
        if request.decoding is not None:
            if self._denoiser is None:
                raise ValueError("decoding asks for diffusion, but this model only generates token by token")
            self._denoiser.check(request)
        self._grammars.prepare(request)

    def forget(self, request_id: str) -> None:
        """Drop what `prepare` made. Idempotent."""
        self._grammars.forget(request_id)

    def close(self) -> None:
        """Keep what outlives the process. The last call."""
        if self._speculator is not None:
            self._speculator.close()

    def profile(self) -> list[StepSample]:
        """Warm up and time a few sizes of step on the empty pool. Only before the first request."""
        if len(self._sequences):
            raise ValueError("the worker is profiled before it serves: a profile writes over the KV pages")
        return measure_steps(self.run, self.info, self._max_seqs, self._max_batched_tokens, self._profile_memory)

    def run(self, plan: StepPlan) -> StepResult:
        """Execute a step; outcomes are in span order.

        Raises ValueError for a plan that breaks the rules of `scheduler.types`, and whatever the forward pass raises;
        in either case the step may be run again, with all or some of its spans.
        """
        return self._finish(self._begin(plan))

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step; what comes back ends it and gives what `run` gives. One step at a time, and the one after it if
        the plan says so: they end in their order.

        On a device that computes beside the host, the forward is under way when this returns. On a CPU nothing is done
        before the end is asked for, unless steps are planned ahead. Raises as `run` does, in either half.
        """
        if not self.is_asynchronous:
            return partial(self.run, plan)
        return partial(self._finish, self._begin(plan))

    def _begin(self, plan: StepPlan) -> _Begun:
        """Apply the plan's differences and start the forward."""
        started_at = time.perf_counter()
        for span in plan.spans:
            if span.read is Read.DENOISE and self._denoiser is None:
                raise ValueError(f"span of sequence {span.seq_id} is to be denoised, which this model cannot")
        if self._speculator is not None and plan.released:
            known = [(seq_id, self._sequences[seq_id]) for seq_id in plan.released if seq_id in self._sequences]
            forget_unknown(state for _, state in known)
            self._speculator.release(known)
        if self._attention is not None:
            self._attention.forget(plan.released)
        self._sequences.apply(plan, self._make_state)
        if not plan.spans:
            return _Begun(plan, started_at, self._num_compiled(), {})
        with torch.inference_mode():
            return self._forward(plan, started_at, self._num_compiled())

    def _finish(self, begun: _Begun) -> StepResult:
        """Read the forward's rows. The first reading waits for the device."""
        outcomes, draft_s = list[Outcome](), 0.0
        if begun.batch is not None and begun.hidden_TH is not None:
            with torch.inference_mode():
                outcomes, draft_s = self._read(begun, begun.batch, begun.hidden_TH)
        # What passed before the step ahead of this one was over is that one's.
        started_at, num_before = max(begun.started_at, self._finished_at), max(begun.num_compiled, self._num_seen)
        self._finished_at, self._num_seen = time.perf_counter(), self._num_compiled()
        elapsed_s, num_compiled = self._finished_at - started_at, self._num_seen - num_before
        return StepResult(begun.plan.step, tuple(outcomes), elapsed_s, draft_s, num_compiled)

    def _make_state(self, admission: Admission, slot: int, step: int) -> SequenceState:
        request = admission.request
        recipe = make_recipe(request, self.info.eos_ids)
        state = SequenceState(request, recipe, slot, list(admission.tokens), step)
        if recipe.features & Feature.PENALTY:
            state.counts = TokenCounts(request.prompt, with_prompt=recipe.counts_prompt)
        try:
            state.matcher = self._grammars.matcher(request)
        except ValueError as error:
            state.failure = str(error)
        return state

    def _forward(self, plan: StepPlan, started_at: float, num_compiled: int) -> _Begun:
        spans = plan.spans
        states = [self._sequences[span.seq_id] for span in spans]
        for span, state in zip(spans, states, strict=True):
            state.put(span)
        probes = self._prober.probes(spans, states) if self._prober is not None else ()
        all_spans, all_states = beside(embedded(spans, self.info.vocab_size), probes), states_of(states, probes)
        host = host_batch(all_spans, all_states, self._sequences.page_table, self.info.page_size)
        # Which rows are sparse is part of a step's shape: such a one is not captured.
        batch = place_sparse(host, all_spans, all_states, self._pool, self._device) or self._place(host)
        self._ahead.fill(plan, batch)
        watched = self._attention.watch(plan.step, spans, states, batch.first_rows) if self._attention else None
        hidden_TH = (watched or self._model).forward(batch.tokens, batch.rows, self._pool.layers)
        errors = {index: state.failure for index, state in enumerate(states) if state.failure is not None}
        begun = _Begun(plan, started_at, num_compiled, errors, states, probes, batch, hidden_TH)
        if self.plans_ahead and not probes and can_choose_early(spans, states):
            choose = self._reader.choose(partial(self._logits, hidden_TH), spans, states, batch.first_rows, errors)
            parts = [part._replace(chosen=part.chosen.light()) for part in choose]
            self._ahead.keep(plan.step, spans, parts)
            begun = begun._replace(parts=parts)
        return begun

    def _logits(self, hidden_TH: Tensor, rows: list[int]) -> Tensor:
        if rows == list(range(hidden_TH.shape[0])):
            return self._model.logits(hidden_TH)
        (index,) = upload([np.asarray(rows, dtype=np.int64)], self._device)
        return self._model.logits(hidden_TH[index])

    def _read(self, begun: _Begun, batch: Batch, hidden_TH: Tensor) -> tuple[list[Outcome], float]:
        """Outcomes in span order and the seconds that went into proposing drafts."""
        plan, states, probes = begun.plan, begun.states, begun.probes
        spans, errors = plan.spans, begun.errors
        if begun.parts is not None:
            readings = self._reader.read(begun.parts, spans, errors)
            self._ahead.settle(plan.step, spans, states, readings)
            return [outcome_of(span.seq_id, readings.get(i), errors.get(i)) for i, span in enumerate(spans)], 0.0
        logits_of = partial(self._logits, hidden_TH)
        prompts, broken = read_prompts(logits_of, spans, states, batch.first_rows, self._rows_at_once)
        errors.update(dict.fromkeys(broken, NOT_FINITE))
        parts = self._reader.choose(logits_of, spans, states, batch.first_rows, errors)
        # Where nobody is asked no drafter works, nor is anything made ready for one.
        speculator = self._speculator if any(span.num_drafts for span in spans) else None
        num_top = speculator.needs_top if speculator is not None else 0
        readings = self._reader.read(parts, spans, errors, num_top)
        denoised = self._denoiser.read(logits_of, spans, states, batch.first_rows, errors) if self._denoiser else {}
        if self._attention is not None:
            self._attention.report(denoised)
        self._accept(spans, states, batch, readings)
        probed = {probe.at: hidden_TH[probe.rows(batch.first_rows, len(spans) + i)] for i, probe in enumerate(probes)}
        drafts, draft_s = dict[int, Drafts](), 0.0
        if speculator is not None:
            asked_at = time.perf_counter()
            drafts = propose(speculator, spans, states, readings, plan.draft_depth, probed)
            draft_s = time.perf_counter() - asked_at
        return [
            denoised[index].outcome(span.seq_id)
            if index in denoised
            else outcome_of(
                span.seq_id, readings.get(index), errors.get(index), prompts.get(index, ()), drafts.get(index)
            )
            for index, span in enumerate(spans)
        ], draft_s

    def _accept(
        self,
        spans: Sequence[Span],
        states: Sequence[SequenceState],
        batch: Batch,
        readings: Mapping[int, Reading],
    ) -> None:
        """Enter accepted drafts into the histories and move those of trees to where their positions belong."""
        sources: list[int] = []
        targets: list[int] = []
        for index, reading in readings.items():
            if len(reading.tokens) > 1:
                states[index].history.extend(reading.tokens[:-1])
                if spans[index].parents:
                    first = batch.first_rows[index]
                    moves = [(source, target) for target, source in enumerate(reading.path) if source != target]
                    sources += [first + source for source, _ in moves]
                    targets += [first + target for _, target in moves]
        if sources:
            slots = batch.rows.slots
            from_slots = slots[torch.tensor(sources, device=self._device)]
            to_slots = slots[torch.tensor(targets, device=self._device)]
            for at, (k_pages, v_pages) in enumerate(self._pool.layers):
                layer = None if self._pool.metadata is None else self._pool.metadata[at]
                self._ops.move_kv(k_pages, v_pages, from_slots, to_slots, layer)

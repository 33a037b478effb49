"""Attention that is looked at: whether the keys that a bidirectional sequence caches have drifted (Elastic-Cache).

Steps with spans of the `elastic` cache run through layers that are looked at (server/models/observed.py), to keep,
per sequence and layer, the rotated queries and keys of all rows as their last computation left them. They are kept
apart from the pages, whose layout is the back end's secret. A few rows' attention probabilities are computed from them:

- of the rows that answer for masks, to find the key that all of them attend to most: the *tracked* row, one a layer,
  never a mask. It comes along in the next step, whatever else that computes.
- of the tracked row, before and after that step. A cosine below `drift` in any layer means: all rows next time.

Source: Nguyen-Tri et al., "Attention Is All You Need for KV Cache in Diffusion LLMs" (Elastic-Cache, 2025).
Departure: deferred. The paper recomputes the layers behind a drifted one within the step, so that one request's row
count changes from layer to layer; here the decision is for the next step, of all layers, and the step that found the
drift has used the old keys once more.
Steps without such spans never come here: they run the back end's fused layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Ops
from scheduler.types import Diffusion, Span
from server.models.observed import ObservedLayers
from server.models.registry import Model
from server.worker.denoising.reader import Denoising
from server.worker.sequences import SequenceState


class Finding(NamedTuple):
    """What a step tells of one sequence. Fields as in `Denoised`."""

    is_stale: bool
    tracked: tuple[int, ...]


class Tracked(NamedTuple):
    """After a step: a row for each layer and its attention [Q, canvas] by the keys as that step left them."""

    step: int
    rows: tuple[int, ...]
    attention: tuple[Tensor, ...]


@dataclass(slots=True)
class Memory:
    """Queries [canvas, Q, D] and keys [canvas, K, D] of every layer; what was tracked after the last two steps."""

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    tracked: list[Tracked] = field(default_factory=list)

    def before(self, step: int) -> Tracked | None:
        """What was tracked before `step`, which may be run again."""
        return next((entry for entry in reversed(self.tracked) if entry.step < step), None)

    def file(self, entry: Tracked) -> None:
        earlier = self.before(entry.step)
        self.tracked = [entry] if earlier is None else [earlier, entry]


@dataclass(slots=True)
class Watch:
    """One span of a step: where its rows are, which of them ask, and what the layers have given so far."""

    index: int
    first_row: int
    positions: Tensor
    asking: Tensor
    is_known: Tensor
    drift: float
    memory: Memory
    before: Tracked | None
    rows: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    similarities: list[Tensor] = field(default_factory=list)

    def see(self, layer: int, q_TQD: Tensor, k_TKD: Tensor, scale: float) -> None:
        """Take in a layer's queries and keys of the span's rows, rotated."""
        size, memory = self.is_known.shape[0], self.memory
        if layer == len(memory.keys):
            memory.queries.append(q_TQD.new_zeros(size, *q_TQD.shape[1:]))
            memory.keys.append(k_TKD.new_zeros(size, *k_TKD.shape[1:]))
        part = slice(self.first_row, self.first_row + self.positions.shape[0])
        memory.queries[layer][self.positions] = q_TQD[part]
        memory.keys[layer][self.positions] = k_TKD[part]
        queries, keys = memory.queries[layer], memory.keys[layer][:size]
        received = probabilities(queries[self.asking], keys, scale).sum((0, 1))
        most = received.masked_fill(~self.is_known, -1.0).argmax()
        self.rows.append(most)
        self.attention.append(probabilities(queries[most].unsqueeze(0), keys, scale)[0])
        if self.before is not None:
            old = self.before.attention[layer][:, :size]
            now = probabilities(queries[self.before.rows[layer]].unsqueeze(0), keys, scale)[0]
            self.similarities.append(F.cosine_similarity(now, old, dim=1).mean())

    def finding(self, step: int) -> Finding:
        rows = tuple(torch.stack(self.rows).tolist())
        self.memory.file(Tracked(step, rows, tuple(self.attention)))
        # Nothing to compare with counts as no drift at all.
        least = min(torch.stack(self.similarities).tolist()) if self.similarities else 1.0
        return Finding(least < self.drift, tuple(sorted(set(rows))))


def probabilities(q_RQD: Tensor, k_LKD: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) of some rows over all keys of their sequence, float32 [R, Q, L]."""
    keys = k_LKD.float().repeat_interleave(q_RQD.shape[1] // k_LKD.shape[1], dim=1)
    return torch.softmax(torch.einsum("rqd,lqd->rql", q_RQD.float(), keys) * scale, dim=-1)


class AttentionProbe:
    """Looks at the spans of the `elastic` cache. One per worker; it remembers sequences until they are forgotten."""

    def __init__(self, model: Model, ops: Ops, mask_id: int, device: torch.device) -> None:
        self._mask_id, self._device = mask_id, device
        self._model = model.through(ObservedLayers(ops, self._see))
        self._memories: dict[int, Memory] = {}
        self._watches: list[Watch] = []
        self._step = self._layer = 0

    def forget(self, seq_ids: Sequence[int]) -> None:
        """Drop what is kept of sequences that the scheduler released. Idempotent."""
        for seq_id in seq_ids:
            self._memories.pop(seq_id, None)

    def watch(
        self, step: int, spans: Sequence[Span], states: Sequence[SequenceState], first_rows: Sequence[int]
    ) -> Model | None:
        """The model to run a step with, if any of its spans is to be looked at. A step may come again."""
        self._step, self._layer = step, 0
        self._watches = [
            self._watch(index, span, state.request.decoding, first_rows[index])
            for index, (span, state) in enumerate(zip(spans, states, strict=True))
            if span.denoise is not None
            and state.request.decoding is not None
            and state.request.decoding.cache.name == "elastic"
        ]
        return self._model if self._watches else None

    def report(self, denoised: dict[int, Denoising]) -> None:
        """Add what the step's attention says to what its spans gave, by index of the span."""
        for watch in self._watches:
            finding = watch.finding(self._step)
            if watch.index in denoised:
                told = denoised[watch.index]
                changes = told.denoised._replace(is_stale=finding.is_stale, tracked=finding.tracked)
                denoised[watch.index] = told._replace(denoised=changes)
        self._watches = []

    def _watch(self, index: int, span: Span, decoding: Diffusion, first_row: int) -> Watch:
        assert span.denoise is not None
        memory = self._memories.setdefault(span.seq_id, Memory())
        positions = list(span.positions or range(span.start, span.start + len(span.tokens)))
        lo = span.denoise.lo
        canvas = span.denoise.state or span.tokens[lo - span.start :]
        is_known = [True] * lo + [token != self._mask_id for token in canvas]
        asking = [positions[offset] for offset in span.judged]

        def tensor(values: list[int] | list[bool]) -> Tensor:
            return torch.tensor(values, device=self._device)

        # Keys that all are computed in this step cannot be stale after it.
        before = memory.before(self._step) if len(positions) < span.kv_len else None
        drift = decoding.cache["drift"]
        return Watch(index, first_row, tensor(positions), tensor(asking), tensor(is_known), drift, memory, before)

    def _see(self, q_TQD: Tensor, k_TKD: Tensor, scale: float) -> None:
        for watch in self._watches:
            watch.see(self._layer, q_TQD, k_TKD, scale)
        self._layer += 1

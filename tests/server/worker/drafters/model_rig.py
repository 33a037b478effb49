"""Sequences, pages and a target that is asked token by token: what the tests of the model drafters stand on.

The target is a `TinyModel` read densely, under the worker's own rules and noise: `TargetText.next` is the token that
plain decoding would give. `verified` is coupled verification by definition: its own tokens as long as drafts agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scheduler.types import Admission, Drafts, Request, StepPlan
from server.worker.drafters.base import Want
from server.worker.drafters.drawing import draw
from server.worker.drafters.paged_forward import PagedForward
from server.worker.drafters.sequential import Reach, SequentialDrafter
from server.worker.drafters.stopping import StopRule
from server.worker.kv_pool import KVPool
from server.worker.process_logits import JudgedRow, process_logits
from server.worker.recipe import make_recipe
from server.worker.sequences import SequenceState, SequenceTable, TokenCounts
from tests.server.worker.tiny_model import EOS, TinyModel

CPU = torch.device("cpu")


class Sequences:
    """A page table and pages for hand-made sequences."""

    def __init__(self, page_size: int = 8, num_pages: int = 64) -> None:
        self.page_size, self.num_pages = page_size, num_pages
        self.table = SequenceTable(8, num_pages, num_pages, page_size)
        self._step = 0
        self._free = list(range(num_pages))

    def admit(self, seq_id: int, request: Request, num_tokens: int = 128, pages: tuple[int, ...] = ()) -> SequenceState:
        """pages: of another sequence, to begin with (a prefix hit)."""
        self._step += 1
        count = -(-num_tokens // self.page_size) - len(pages)
        own = (*pages, *(self._free.pop() for _ in range(count)))
        plan = StepPlan(self._step, (), (Admission(seq_id, request, request.prompt),), ((seq_id, own),))
        self.table.apply(plan, _make_state)
        return self.table[seq_id]

    def pages_of(self, seq_id: int) -> tuple[int, ...]:
        state = self.table[seq_id]
        return tuple(int(page) for page in self.table.page_table[state.slot, : state.num_pages])


def _make_state(admission: Admission, slot: int, step: int) -> SequenceState:
    request = admission.request
    recipe = make_recipe(request, (EOS,))
    state = SequenceState(request, recipe, slot, list(admission.tokens), step)
    sampling = request.sampling
    if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0):
        state.counts = TokenCounts(request.prompt, with_prompt=recipe.counts_prompt)
    return state


def own_pool(model: TinyModel, sequences: Sequences) -> KVPool:
    return KVPool(model.ops, model.config, sequences.num_pages, sequences.page_size, torch.float32, CPU, poison=True)


def drafter_of(
    model: TinyModel, sequences: Sequences, reach: Reach, stop: StopRule | None = None, max_len: int = 256
) -> SequentialDrafter:
    """A drafter of `model` with a poisoned pool of its own."""
    vocab_size = model.head.shape[0]
    forward = PagedForward(model, own_pool(model, sequences).layers, sequences.table, vocab_size, CPU)
    return SequentialDrafter("draft_model", forward, reach, stop or StopRule(), model.ops, max_len, vocab_size, 0)


class TargetText:
    """What plain decoding of `model` says."""

    def __init__(self, model: TinyModel) -> None:
        self._model = model

    def next(self, state: SequenceState, tokens: Sequence[int]) -> int:
        logits_JV = self._model.dense_logits(tokens)[-1:]
        num_output = len(tokens) - state.num_prompt
        counts = None
        if state.counts is not None:
            counts = state.counts.beyond(tokens, ())
        row = JudgedRow(state.recipe, tokens, num_output, counts)
        assert not process_logits(self._model.ops, logits_JV, [row])
        return int(draw(self._model.ops, logits_JV, [row]))

    def extended(self, state: SequenceState, tokens: Sequence[int], count: int) -> list[int]:
        found = list(tokens)
        for _ in range(count):
            found.append(self.next(state, found))
        return found

    def verified(self, state: SequenceState, tokens: Sequence[int], drafts: Drafts | None) -> list[int]:
        """The tokens that a step gives: accepted drafts and one more."""
        found = list(tokens)
        for draft in drafts.tokens if drafts is not None else ():
            found.append(self.next(state, found))
            if found[-1] != draft:
                return found[len(tokens) :]
        return [*found[len(tokens) :], self.next(state, found)]


def want(seq_id: int, state: SequenceState, tokens: Sequence[int], num_drafts: int, tree: bool = False) -> Want:
    return Want(seq_id, state, list(tokens), num_drafts, tree=tree)

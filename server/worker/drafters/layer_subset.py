"""`layer_subset`: some of the target's own layers draft for it. No weights and no KV of its own.

The layers that run read the target's keys of all committed tokens and write their own for the last token and the drafts
behind it. Those are scratch: verification writes the same positions anew in every layer before anything reads them
(R3), so a rejected or a never verified draft leaves no trace, and the layers may change at any step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import Tensor

from kernels.ops import AttentionRows, Ops
from scheduler.types import Drafts
from server.worker.drafters.base import Want
from server.worker.drafters.dense_reader import DenseReader
from server.worker.drafters.layer_choice import LayerChoice, Layers, make_choice, text_to_score
from server.worker.drafters.paged_forward import DraftingModel, PagedForward
from server.worker.drafters.sequential import SequentialDrafter
from server.worker.drafters.stopping import stop_rule
from server.worker.kv_pool import KVPool, KVShape
from server.worker.sequences import SequenceState, SequenceTable

SCORE_EVERY = 8
"""Calls between two scores: with SCORE_TOKENS rows each, a small part of the drafting they are to improve."""
SCORE_TOKENS = 64
KEPT_SUBSETS = 8


class LayeredModel(DraftingModel, Protocol):
    """A model that can run some of its layers (`server/models/layers.py: Decoder`)."""

    def subset(self, layers: Collection[int]) -> DraftingModel: ...


class SharedReach:
    """Reach of the target's own keys: all tokens but the last, whose key the next step writes."""

    def num_valid(self, seq_id: int, tokens: Sequence[int]) -> int:
        return len(tokens) - 1

    def feed_sizes(self, lags: Sequence[int]) -> list[int]:
        return list(lags)

    def fed(self, seq_id: int, num_valid: int) -> None:
        pass

    def drafted(self, seq_id: int, tokens: Sequence[int]) -> None:
        pass

    def release(self, seq_id: int) -> None:
        pass


class ChosenLayers:
    """The target with the layers that the choice now says; the last few subsets are kept ready."""

    def __init__(self, model: LayeredModel, choice: LayerChoice) -> None:
        self._model, self.choice = model, choice
        self._subsets: dict[Layers, DraftingModel] = {}

    def of(self, layers: Layers) -> DraftingModel:
        if layers not in self._subsets:
            if len(self._subsets) >= KEPT_SUBSETS:
                del self._subsets[next(iter(self._subsets))]
            self._subsets[layers] = self._model.subset(layers)
        return self._subsets[layers]

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return self.of(self.choice.layers).forward(tokens_T, rows, kv)

    def logits(self, hidden_JH: Tensor) -> Tensor:
        return self._model.logits(hidden_JH)


class LayerSubsetDrafter:
    """`Drafter`: drafts with the chosen layers, and now and then scores others."""

    name = "layer_subset"
    is_sequential = True
    needs_top = 0

    def __init__(
        self, drafter: SequentialDrafter, model: LayeredModel, chosen: ChosenLayers, reader: DenseReader
    ) -> None:
        self._drafter, self._model, self._chosen, self._reader = drafter, model, chosen, reader
        self._num_calls = 0

    @property
    def num_bytes(self) -> int:
        return self._reader.num_bytes

    @property
    def layers(self) -> Layers:
        """The layers that draft now."""
        return self._chosen.choice.layers

    def serves(self, state: SequenceState) -> bool:
        return True

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        if depth < 1 or not wants:
            return [None] * len(wants)
        self._num_calls += 1
        if self._num_calls % SCORE_EVERY == 0:
            self._score(wants)
        return self._drafter.propose(wants, min(depth, self._chosen.choice.most_drafts))

    def release(self, seq_id: int, state: SequenceState) -> None:
        """Nothing is kept of a sequence."""

    def _score(self, wants: Sequence[Want]) -> None:
        choice = self._chosen.choice
        candidate = choice.candidate()
        text = text_to_score([(want.tokens, want.state.num_prompt) for want in wants], self._reader.max_tokens)
        if candidate is None or text is None:
            return
        tokens, start = text
        # The row of a token decides the next one.
        expected = self._best(self._model, tokens)[start - 1 : -1]
        found = self._best(self._chosen.of(candidate), tokens)[start - 1 : -1]
        choice.learn(candidate, int((found == expected).sum()), len(expected))

    def _best(self, model: DraftingModel, tokens: Sequence[int]) -> Tensor:
        return self._model.logits(self._reader.read(model, tokens)).argmax(dim=1)


def build_layer_subset(
    model: LayeredModel,
    shape: KVShape,
    source: str,
    pool: KVPool,
    sequences: SequenceTable,
    ops: Ops,
    vocab_size: int,
    max_len: int,
    max_drafts: int,
    stop: str,
) -> LayerSubsetDrafter:
    """The drafter for a source (`make_choice`). stop: fixed or confidence; max_len: positions of the model.

    Raises ValueError for an unknown source or stop rule.
    """
    chosen = ChosenLayers(model, make_choice(source, shape.num_layers, max_drafts))
    forward = PagedForward(chosen, pool.layers, sequences, vocab_size, pool.device)
    drafter = SequentialDrafter(
        "layer_subset", forward, SharedReach(), stop_rule(stop), ops, max_len, vocab_size, num_bytes=0
    )
    reader = DenseReader(ops, shape, SCORE_TOKENS, pool.page_size, pool.dtype, pool.device)
    return LayerSubsetDrafter(drafter, model, chosen, reader)

"""Forwards of a drafting model over the pages that sequences already have: feeds in, last hidden states out.

A drafter's model reads the same page table as the target. Its KV may be a pool of its own (draft_model.py) or the
target's (layer_subset.py); either way a feed stays inside the pages its sequence has (R2) and writes nothing before
the first position that it was told to feed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.ops import AttentionRows
from scheduler.types import Span
from server.worker.batch import Batch, build_batch
from server.worker.sequences import SequenceState, SequenceTable
from server.worker.sparse_memory import SparseMemory


class DraftingModel(Protocol):
    """What drafts are made with."""

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor: ...
    def logits(self, hidden_JH: Tensor) -> Tensor: ...


class Feed(NamedTuple):
    """Tokens to run, the first of them at KV index `start`."""

    seq_id: int
    state: SequenceState
    tokens: Sequence[int]
    start: int


class TreeFeed(NamedTuple):
    """Nodes of a draft tree to run; their keys go to KV index start, start + 1, ...

    tree_start  KV index of bit 0 of the masks: the keys before it are seen by all nodes
    positions   of the nodes: tree_start + depth - 1
    masks       of each node its ancestors and itself
    """

    seq_id: int
    state: SequenceState
    tokens: tuple[int, ...]
    start: int
    tree_start: int
    positions: tuple[int, ...]
    masks: tuple[int, ...]


class PagedForward:
    """One model, its KV and the page table of the sequences."""

    def __init__(
        self,
        model: DraftingModel,
        kv: Sequence[tuple[Tensor, Tensor]],
        sequences: SequenceTable,
        vocab_size: int,
        device: torch.device,
        sparse: SparseMemory | None = None,
    ) -> None:
        """vocab_size: the target's; logits have this many columns whatever the drafting model's table has.

        sparse  metadata of `kv`: rows of requests that ask for it read a part of their keys
        """
        self.model, self.kv = model, kv
        self._sequences, self._vocab_size, self._device, self._sparse = sequences, vocab_size, device, sparse

    def capacity(self, state: SequenceState) -> int:
        """Tokens that the sequence's pages hold."""
        return state.num_pages * self._sequences.page_size

    def run(self, feeds: Sequence[Feed]) -> Tensor:
        """Feed all (none empty) in one forward; hidden states [feeds, H] of each feed's last token."""
        batch = self._batch(feeds)
        hidden_TH = self.model.forward(batch.tokens, batch.rows, self.kv)
        if len(feeds) == hidden_TH.shape[0]:
            return hidden_TH
        return hidden_TH[torch.tensor(batch.first_rows[1:], device=self._device) - 1]

    def run_trees(self, feeds: Sequence[TreeFeed]) -> Tensor:
        """Feed nodes of trees in one forward; hidden states of all of them, in order."""
        batch = self._batch(feeds)
        masks = [mask - (1 << 64) if mask >> 63 else mask for feed in feeds for mask in feed.masks]
        starts = [feed.tree_start for feed in feeds for _ in feed.masks]
        rows = replace(
            batch.rows,
            positions=self._tensor([position for feed in feeds for position in feed.positions], torch.int32),
            tree=self._tensor(masks, torch.int64),
            tree_starts=self._tensor(starts, torch.int32),
        )
        return self.model.forward(batch.tokens, rows, self.kv)

    def _batch(self, feeds: Sequence[Feed] | Sequence[TreeFeed]) -> Batch:
        spans = [Span(feed.seq_id, tuple(feed.tokens), feed.start, feed.start + len(feed.tokens)) for feed in feeds]
        states = [feed.state for feed in feeds]
        table, page_size = self._sequences.page_table, self._sequences.page_size
        return build_batch(spans, states, table, page_size, self._device, self._sparse)

    def _tensor(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def logits(self, hidden_JH: Tensor) -> Tensor:
        """Float32 [J, V]; ids that the drafting model does not know are banned, ids only it knows are cut."""
        logits_JV = self.model.logits(hidden_JH)
        missing = self._vocab_size - logits_JV.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits_JV, (0, missing), value=float("-inf"))
        return logits_JV[:, : self._vocab_size].contiguous() if missing < 0 else logits_JV

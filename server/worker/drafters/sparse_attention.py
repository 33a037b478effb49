"""`sparse_attention`: the target itself drafts, reading only some of the keys (`attention.lossless`).

All layers and weights are the target's; its sparse rows read the target's keys of the committed tokens and write their
own for the last token and the drafts behind it. Those are scratch: the verifying span, which is dense, writes the same
positions anew before anything reads them (R3). So the text is that of dense attention, and pages stay shareable.
Source: self-speculation as in Zhang et al., "Draft & Verify" (2023), with keys left out instead of layers (attention
reference 4.0, "lossless mode").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kernels.ops import Ops
from scheduler.types import Drafts
from server.worker.drafters.base import Want
from server.worker.drafters.layer_subset import SharedReach
from server.worker.drafters.paged_forward import DraftingModel, PagedForward
from server.worker.drafters.sequential import SequentialDrafter
from server.worker.drafters.stopping import stop_rule
from server.worker.kv_pool import KVPool
from server.worker.sequences import SequenceState, SequenceTable


class SparseAttentionDrafter:
    """`Drafter` for requests whose attention is lossless; others get nothing from it."""

    name = "sparse_attention"
    is_sequential = True
    needs_top = 0
    num_bytes = 0

    def __init__(self, drafter: SequentialDrafter) -> None:
        self._drafter = drafter

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        offers: list[Drafts | None] = [None] * len(wants)
        asking = [at for at, want in enumerate(wants) if _is_lossless(want.state)]
        if asking:
            # A sparse row has no tree mask.
            chains = [wants[at]._replace(tree=False) for at in asking]
            for at, offer in zip(asking, self._drafter.propose(chains, depth), strict=True):
                offers[at] = offer
        return offers

    def release(self, seq_id: int, state: SequenceState) -> None:
        """Nothing is kept of a sequence."""


def _is_lossless(state: SequenceState) -> bool:
    attention = state.request.attention
    return attention is not None and attention.lossless


def build_sparse_attention(
    model: DraftingModel,
    pool: KVPool,
    sequences: SequenceTable,
    ops: Ops,
    vocab_size: int,
    max_len: int,
    stop: str,
) -> SparseAttentionDrafter:
    """stop: fixed or confidence; max_len: positions of the model. Raises ValueError for a pool without metadata."""
    if pool.sparse is None:
        raise ValueError(
            "drafters names 'sparse_attention', but no method is there to draft with; set sparse-attention"
        )
    drafting = replace(pool.sparse, is_drafting=True)
    forward = PagedForward(model, pool.layers, sequences, vocab_size, pool.device, drafting)
    return SparseAttentionDrafter(
        SequentialDrafter(
            "sparse_attention", forward, SharedReach(), stop_rule(stop), ops, max_len, vocab_size, num_bytes=0
        )
    )

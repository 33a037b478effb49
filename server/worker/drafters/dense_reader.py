"""Reads one text at a time from its beginning, every row at once, over a few pages of its own.

For what is learnt beside serving (scores of layer subsets, labels for a head): no sequence's KV is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionRows, Ops
from server.worker.drafters.paged_forward import DraftingModel
from server.worker.kv_pool import KVPool, KVShape, pages_for


class DenseReader:
    """Pages for texts of at most `max_tokens`; the next text is written over the last one."""

    def __init__(
        self, ops: Ops, shape: KVShape, max_tokens: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.max_tokens = max_tokens
        self._pool = KVPool(ops, shape, pages_for(max_tokens, page_size), page_size, dtype, device)

    @property
    def num_bytes(self) -> int:
        return self._pool.num_bytes

    def read(self, model: DraftingModel, tokens: Sequence[int]) -> Tensor:
        """Hidden states [T, H] of all rows of 1 to `max_tokens` tokens."""
        device = self._pool.device
        positions = torch.arange(len(tokens), device=device)
        rows = AttentionRows(
            page_table=torch.arange(self._pool.num_pages, dtype=torch.int32, device=device).unsqueeze(0),
            row_seq=torch.zeros(len(tokens), dtype=torch.int32, device=device),
            positions=positions.int(),
            visible=(positions + 1).int(),
            slots=positions,
            span_starts=torch.tensor([0, len(tokens)], dtype=torch.int32, device=device),
        )
        return model.forward(torch.tensor(list(tokens), device=device), rows, self._pool.layers)

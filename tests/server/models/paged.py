"""Drives a model over a paged KV cache as the worker does: shuffled pages, poisoned memory, any spans in a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionRows, Ops
from server.models.registry import Model

Span = tuple[int, int, Sequence[int]]
"""(sequence, KV index of its first token, tokens)."""

POISON_PAGE = -7
"""Page-table entries past a sequence's end; reading one is an error or a wrong page."""


class PagedRunner:
    """KV pages for `num_seqs` sequences of up to `max_len` tokens, full of NaN until written."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        num_seqs: int,
        max_len: int,
        page_size: int = 16,
        seed: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._page_size = page_size
        config, device = model.config, torch.device("cpu")
        pages_each = -(-max_len // page_size)
        num_pages = num_seqs * pages_each + 3
        shuffled = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
        self._tables = shuffled[: num_seqs * pages_each].view(num_seqs, pages_each)
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        dtype = kv_dtype or config.dtype or torch.float32
        self._kv = [ops.allocate_kv(*shape, dtype, device) for _ in range(config.num_layers)]
        for pages in (pages for pair in self._kv for pages in pair):
            pages.fill_(float("nan"))

    def run(self, spans: Sequence[Span], mask_block: int = 1) -> list[Tensor]:
        """One step; float32 logits of every row, [tokens, V] per span."""
        lengths = [len(tokens) for _, _, tokens in spans]
        tokens = torch.tensor([token for _, _, span in spans for token in span])
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        with torch.inference_mode():
            hidden = self._model.forward(tokens, self._rows(spans, starts, mask_block), self._kv)
            return list(torch.split(self._model.logits(hidden), lengths))

    def _rows(self, spans: Sequence[Span], starts: Tensor, mask_block: int) -> AttentionRows:
        table = torch.full((len(spans), self._tables.shape[1]), POISON_PAGE)
        positions, row_seq, slots, visible = [], [], [], []
        for index, (seq, start, tokens) in enumerate(spans):
            kv_len = start + len(tokens)
            used = -(-kv_len // self._page_size)
            table[index, :used] = self._tables[seq, :used]
            position = torch.arange(start, kv_len)
            positions.append(position)
            row_seq.append(torch.full_like(position, index))
            slots.append(self._tables[seq, position // self._page_size] * self._page_size + position % self._page_size)
            visible.append(((position // mask_block + 1) * mask_block).clamp_max(kv_len))
        return AttentionRows(
            page_table=table.int(),
            row_seq=torch.cat(row_seq).int(),
            positions=torch.cat(positions).int(),
            visible=torch.cat(visible).int(),
            slots=torch.cat(slots),
            span_starts=starts,
        )

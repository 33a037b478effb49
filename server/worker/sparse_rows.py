"""Which rows of a step are sparse, as the back end reads it.

A row is sparse if its token is output of a request with `Request.attention` and not corrected (`Span.dense_end`): a
matter of positions alone, so that a step computed again after a preemption, or a draft that is verified, reads what the
decode step would have read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels.sparse import Method, SparseRows
from scheduler.types import Span
from server.worker.sequences import SequenceState
from server.worker.sparse_memory import METHODS, SparseMemory
from server.worker.transfer import upload


def sparse_rows(
    memory: SparseMemory,
    spans: Sequence[Span],
    states: Sequence[SequenceState],
    first_rows: Sequence[int],
    device: torch.device,
) -> SparseRows | None:
    """The sparse rows of a step, None if there are none. first_rows: of each span, and the number of rows.

    Raises ValueError for a sparse span that is no chain.
    """
    index = np.full(first_rows[-1], -1, dtype=np.int32)
    methods: list[int] = []
    budgets: list[int] = []
    least = {offer.method: offer.least_budget for offer in memory.offers}
    for at, (span, state) in enumerate(zip(spans, states, strict=True)):
        asked = state.request.attention
        # Spans under another mask are drafts of a model that denoises: their keys are scratch.
        if asked is None or asked.lossless is not memory.is_drafting or span.mask_block != 1:
            continue
        if span.parents:
            raise ValueError(f"the span of sequence {span.seq_id} is a tree, but its rows read a part of their keys")
        first = first_rows[at] + max(0, max(state.num_prompt, span.dense_end) - span.start)
        count = max(0, first_rows[at + 1] - first)
        index[first : first + count] = np.arange(len(methods), len(methods) + count)
        methods += [METHODS[asked.method]] * count
        # More keys than there are is all of them; a list is as long as the longest budget.
        budgets += [min(asked.budget, max(least[asked.method], span.kv_len))] * count
    if not methods:
        return None
    listing = {Method.TIDAL, Method.DOUBLE_SPARSITY} if memory.is_ahead else {Method.TIDAL}
    most = max((budget for method, budget in zip(methods, budgets, strict=True) if method in listing), default=0)
    lists = torch.empty((len(methods), memory.num_kv_heads, most), dtype=torch.int32, device=device) if most else None
    arrays = [index, np.asarray(methods, dtype=np.int32), np.asarray(budgets, dtype=np.int32)]
    of_row, method, budget = upload(arrays, device)
    return SparseRows(of_row, method, budget, lists)

"""The batch of a step with rows that read a part of their keys: of answers, of prompts, or of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kernels.prefill_rows import with_parts
from scheduler.types import Span
from server.worker.batch import Batch, HostBatch, place
from server.worker.kv_pool import KVPool
from server.worker.sequences import SequenceState
from server.worker.sparse_prefill_rows import prefill_parts
from server.worker.sparse_rows import sparse_rows


def place_sparse(
    host: HostBatch, spans: Sequence[Span], states: Sequence[SequenceState], pool: KVPool, device: torch.device
) -> Batch | None:
    """None = all rows read all they see. Raises ValueError for spans whose rows cannot be sparse."""
    sparse = None
    if pool.sparse is not None:
        sparse = sparse_rows(pool.sparse, spans, states, host.first_rows, device)
    parts = prefill_parts(spans, states, host.first_rows)
    if sparse is None and not parts:
        return None
    batch = place(host, device, pool.metadata, sparse)
    return replace(batch, rows=with_parts(batch.rows, parts)) if parts else batch

"""A plan's spans as tensors: tokens, where each row lives in the KV cache, and which rows are judged.

Vectorised over tokens; the only Python loops are over spans (512 spans cost well under a millisecond) and over the rows
of draft trees. The mask rule is `Span.mask_block`'s: row at KV index i sees keys
[0, min(kv_len, (i // mask_block + 1) * mask_block)); a row of a tree sees what `Span.parents` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionRows
from scheduler.types import Span
from server.worker.sequences import SequenceState


@dataclass(frozen=True)
class Batch:
    """One step's inputs. T rows, one per span token, in span order.

    tokens       int64 [T]
    first_rows   row of each span's first token; one more entry, T, at the end
    """

    tokens: Tensor
    rows: AttentionRows
    first_rows: list[int]


def build_batch(
    spans: Sequence[Span],
    states: Sequence[SequenceState],
    page_table: NDArray[np.int32],
    page_size: int,
    device: torch.device,
) -> Batch:
    """Turn spans (at least one, none empty) and their sequences' states into tensors on `device`.

    Raises ValueError if a span is empty or reaches past the pages its sequence has.
    """
    num_spans = len(spans)
    lengths = np.fromiter((len(span.tokens) for span in spans), np.int64, num_spans)
    starts = np.fromiter((span.start for span in spans), np.int64, num_spans)
    kv_lens = np.fromiter((span.kv_len for span in spans), np.int64, num_spans)
    blocks = np.fromiter((span.mask_block for span in spans), np.int64, num_spans)
    slots = np.fromiter((state.slot for state in states), np.int64, num_spans)
    num_pages = np.fromiter((state.num_pages for state in states), np.int64, num_spans)
    _check(spans, states, lengths, starts, kv_lens, num_pages * page_size)

    bounds = np.zeros(num_spans + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    num_rows = int(bounds[-1])
    tokens = np.fromiter(chain.from_iterable(span.tokens for span in spans), np.int64, num_rows)
    row_span = np.repeat(np.arange(num_spans), lengths)
    indices = np.arange(num_rows) + (starts - bounds[:-1])[row_span]
    row_blocks = blocks[row_span]
    visible = np.minimum(kv_lens[row_span], (indices // row_blocks + 1) * row_blocks)

    # Only the rows and columns this step reads: a copy of at most spans x pages integers.
    width = int((kv_lens.max() + page_size - 1) // page_size)
    table = page_table[slots, :width]
    kv_slots = table[row_span, indices // page_size].astype(np.int64) * page_size + indices % page_size

    def tensor(values: NDArray[np.int64] | NDArray[np.int32], dtype: type) -> Tensor:
        return torch.from_numpy(values.astype(dtype, copy=False)).to(device, non_blocking=True)

    branching = [at for at, span in enumerate(spans) if span.parents]
    masks, positions = _trees(spans, branching, bounds, indices) if branching else (None, indices)
    rows = AttentionRows(
        page_table=tensor(table, np.int32),
        row_seq=tensor(row_span, np.int32),
        positions=tensor(positions, np.int32),
        visible=tensor(visible, np.int32),
        slots=tensor(kv_slots, np.int64),
        span_starts=tensor(bounds, np.int32),
        tree=None if masks is None else tensor(masks, np.int64),
        tree_starts=None if masks is None else tensor(starts[row_span], np.int32),
    )
    return Batch(tokens=tensor(tokens, np.int64), rows=rows, first_rows=bounds.tolist())


def _trees(
    spans: Sequence[Span], branching: list[int], bounds: NDArray[np.int64], indices: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per row of the step: the bits of its ancestors and of itself, 0 outside trees; its position, start + depth."""
    masks, positions = np.zeros(len(indices), dtype=np.uint64), indices.copy()
    for at in branching:
        first, start = int(bounds[at]), spans[at].start
        seen, depths = [1], [0]
        for offset, parent in enumerate(spans[at].parents[1:], 1):
            seen.append(seen[parent] | 1 << offset)
            depths.append(depths[parent] + 1)
        masks[first : first + len(seen)] = seen
        positions[first : first + len(seen)] = np.asarray(depths) + start
    return masks.view(np.int64), positions


def _check(
    spans: Sequence[Span],
    states: Sequence[SequenceState],
    lengths: NDArray[np.int64],
    starts: NDArray[np.int64],
    kv_lens: NDArray[np.int64],
    capacity: NDArray[np.int64],
) -> None:
    """A span outside its own pages would read or write another sequence's: refuse rather than compute (R2)."""
    if (lengths < 1).any():
        raise ValueError(f"span of sequence {spans[int(np.argmin(lengths))].seq_id} has no tokens")
    bad = (kv_lens > capacity) | (starts + lengths > kv_lens) | (starts < 0)
    if bad.any():
        at = int(np.argmax(bad))
        span = spans[at]
        raise ValueError(
            f"span of sequence {span.seq_id} covers KV [{span.start}, {span.start + len(span.tokens)}) with kv_len "
            f"{span.kv_len}, but its {states[at].num_pages} pages hold {int(capacity[at])} tokens"
        )

"""A plan's spans as tensors: tokens, where each row lives in the KV cache, and which rows are judged.

Vectorised over tokens; the only Python loops are over spans (512 spans cost well under a millisecond) and over the rows
of draft trees, of shadows and of scattered spans. The mask rule is `Span.mask_block`'s: row at KV index i sees keys
[0, min(kv_len, (i // mask_block + 1) * mask_block)); a row of a tree sees what `Span.parents` says, a shadow row what
`Denoise.shadow` says, and no other row sees a shadow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionRows
from scheduler.types import MASK_ALL, MAX_TREE_NODES, Denoise, Span
from server.worker.sequences import SequenceState
from server.worker.sparse_memory import SparseMemory
from server.worker.sparse_rows import sparse_rows


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
    sparse: SparseMemory | None = None,
) -> Batch:
    """Turn spans (at least one, none empty) and their sequences' states into tensors on `device`.

    sparse  what the KV memory has for sparse rows; None = there are none
    Raises ValueError if a span is empty or reaches past the pages its sequence has.
    """
    num_spans = len(spans)
    lengths = np.fromiter((len(span.tokens) for span in spans), np.int64, num_spans)
    starts = np.fromiter((span.start for span in spans), np.int64, num_spans)
    special = [at for at, span in enumerate(spans) if span.parents or span.positions or span.denoise is not None]
    kv_lens = np.fromiter((span.kv_len for span in spans), np.int64, num_spans)
    blocks = np.fromiter((span.mask_block for span in spans), np.int64, num_spans)
    slots = np.fromiter((state.slot for state in states), np.int64, num_spans)
    num_pages = np.fromiter((state.num_pages for state in states), np.int64, num_spans)
    ends = starts + lengths
    for at in special:
        if spans[at].positions:
            ends[at] = _end_of_scattered(spans[at])
    _check(spans, states, lengths, starts, ends, kv_lens, num_pages * page_size)

    bounds = np.zeros(num_spans + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    first_rows: list[int] = bounds.tolist()
    num_rows = first_rows[-1]
    tokens = np.fromiter(chain.from_iterable(span.tokens for span in spans), np.int64, num_rows)
    row_span = np.repeat(np.arange(num_spans), lengths)
    indices = np.arange(num_rows) + (starts - bounds[:-1])[row_span]
    positions, masks, mask_starts, shadows = _place_special(spans, special, bounds, indices)
    row_blocks = blocks[row_span]
    visible = np.minimum((kv_lens - shadows)[row_span], (indices // row_blocks + 1) * row_blocks)

    # Only the rows and columns this step reads: a copy of at most spans x pages integers.
    width = int((kv_lens.max() + page_size - 1) // page_size)
    table = page_table[slots, :width]
    kv_slots = table[row_span, indices // page_size].astype(np.int64) * page_size + indices % page_size

    def tensor(values: NDArray[np.int64] | NDArray[np.int32], dtype: type) -> Tensor:
        return torch.from_numpy(values.astype(dtype, copy=False)).to(device, non_blocking=True)

    rows = AttentionRows(
        page_table=tensor(table, np.int32),
        row_seq=tensor(row_span, np.int32),
        positions=tensor(positions, np.int32),
        visible=tensor(visible, np.int32),
        slots=tensor(kv_slots, np.int64),
        span_starts=tensor(bounds, np.int32),
        tree=None if masks is None else tensor(masks, np.int64),
        tree_starts=None if mask_starts is None else tensor(mask_starts, np.int32),
        sparse=None if sparse is None else sparse_rows(sparse, spans, states, first_rows, device),
        layers=None if sparse is None else sparse.layers,
    )
    return Batch(tokens=tensor(tokens, np.int64), rows=rows, first_rows=first_rows)


class _Places(NamedTuple):
    """Per row its position, the mask of rows that have one and the key that its first bit means; shadows per span.

    The masks are None in a step that has none.
    """

    positions: NDArray[np.int64]
    masks: NDArray[np.int64] | None
    mask_starts: NDArray[np.int64] | None
    shadows: NDArray[np.int64]


def _place_special(
    spans: Sequence[Span], special: Sequence[int], bounds: NDArray[np.int64], indices: NDArray[np.int64]
) -> _Places:
    """Places of all rows; `indices`, the rows' KV indices, are set right for spans that do not lie in a row."""
    shadows = np.zeros(len(spans), dtype=np.int64)
    if not special:
        return _Places(indices, None, None, shadows)
    masks, mask_starts = np.zeros(len(indices), dtype=np.uint64), np.zeros(len(indices), dtype=np.int64)
    for at in special:
        if spans[at].positions:
            indices[bounds[at] : bounds[at + 1]] = spans[at].positions
    positions = indices.copy()
    for at in special:
        span, rows = spans[at], slice(int(bounds[at]), int(bounds[at + 1]))
        if span.parents:
            _place_tree(span, positions[rows], masks[rows], mask_starts[rows])
        elif span.denoise is not None and span.denoise.shadow:
            shadows[at] = span.denoise.shadow
            _place_shadows(span, span.denoise, indices[rows], positions[rows], masks[rows], mask_starts[rows])
    if not masks.any():
        return _Places(positions, None, None, shadows)
    return _Places(positions, masks.view(np.int64), mask_starts, shadows)


def _place_tree(
    span: Span, positions: NDArray[np.int64], masks: NDArray[np.uint64], mask_starts: NDArray[np.int64]
) -> None:
    """A tree's rows see their ancestors and themselves and stand at start + depth."""
    seen, depths = [1], [0]
    for offset, parent in enumerate(span.parents[1:], 1):
        seen.append(seen[parent] | 1 << offset)
        depths.append(depths[parent] + 1)
    masks[:], mask_starts[:] = seen, span.start
    positions[:] = np.asarray(depths) + span.start


def _place_shadows(
    span: Span,
    denoise: Denoise,
    indices: NDArray[np.int64],
    positions: NDArray[np.int64],
    masks: NDArray[np.uint64],
    mask_starts: NDArray[np.int64],
) -> None:
    """Shadow i, the last rows' i-th, stands at position lo + i and sees all keys but the block's i-th and, of the
    shadows, itself.

    A mask has 64 bits, so the block's keys must lie right before the shadows': behind the rest of a canvas, if there
    is one. Order in memory means nothing to rows that see all of it.
    """
    size, num_own = denoise.hi - denoise.lo, len(span.tokens) - denoise.shadow
    end = span.kv_len - denoise.shadow
    if denoise.shadow != size or 2 * size > MAX_TREE_NODES or span.positions or num_own < end - denoise.lo:
        raise ValueError(
            f"span of sequence {span.seq_id} has {denoise.shadow} shadows of a block of {size}; all of a block of "
            f"{MAX_TREE_NODES // 2} at most have one, and the span brings all keys from the block on"
        )
    positions[num_own:] = np.arange(denoise.lo, denoise.hi)
    own = positions[:num_own]
    indices[:num_own] = np.where(
        own >= denoise.hi, own - size, np.where(own >= denoise.lo, own + (end - denoise.hi), own)
    )
    each = np.arange(size, dtype=np.uint64)
    one = np.uint64(1)
    block = np.uint64((1 << size) - 1)
    masks[num_own:] = (block ^ (one << each)) | (one << (each + np.uint64(size)))
    mask_starts[num_own:] = end - size


def _end_of_scattered(span: Span) -> int:
    """Raises ValueError unless the positions are one for each token, ascending, of a bidirectional span."""
    positions = span.positions
    is_ascending = all(a < b for a, b in pairwise(positions))
    if len(positions) != len(span.tokens) or positions[0] < 0 or not is_ascending or span.mask_block != MASK_ALL:
        raise ValueError(
            f"span of sequence {span.seq_id} brings {len(span.tokens)} tokens at positions {positions}; expected one "
            "for each, ascending, of a span that sees its whole canvas"
        )
    return positions[-1] + 1


def _check(
    spans: Sequence[Span],
    states: Sequence[SequenceState],
    lengths: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    kv_lens: NDArray[np.int64],
    capacity: NDArray[np.int64],
) -> None:
    """A span outside its own pages would read or write another sequence's: refuse rather than compute (R2)."""
    if (lengths < 1).any():
        raise ValueError(f"span of sequence {spans[int(np.argmin(lengths))].seq_id} has no tokens")
    bad = (kv_lens > capacity) | (ends > kv_lens) | (starts < 0)
    if bad.any():
        at = int(np.argmax(bad))
        span = spans[at]
        raise ValueError(
            f"span of sequence {span.seq_id} covers KV [{span.start}, {int(ends[at])}) with kv_len "
            f"{span.kv_len}, but its {states[at].num_pages} pages hold {int(capacity[at])} tokens"
        )

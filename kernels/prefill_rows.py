"""Rows of a step that are of block-sparse prompts, and the step without them. The words that all back ends share.

A part is a region of one prompt, from its first row to its last: what its rows read is a function of its own queries
and of the keys before its end (`sparse_prefill.py`), and of nothing else in the step. Keys of all rows are written
before any part attends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.sparse_prefill import PermutedBlocks, XAttention

if TYPE_CHECKING:
    from kernels.ops import AttentionRows


@dataclass(frozen=True)
class PrefillPart:
    """Rows of the step [first, first + count), at positions [start, start + count) of one sequence.

    sequence  its row of the page table
    method    a chunk of several tiles is a part under XAttention; under PBS-Attn it decides which rows rank the keys
    """

    first: int
    count: int
    start: int
    sequence: int
    method: XAttention | PermutedBlocks

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, eq=False)
class PrefillRows:
    """The parts of a step. others: its other rows, those of the parts see nothing there; None = there are none."""

    parts: tuple[PrefillPart, ...]
    others: AttentionRows | None


def with_parts(rows: AttentionRows, parts: Sequence[PrefillPart]) -> AttentionRows:
    """The step with these parts, which have at least one row and none in common."""
    if sum(part.count for part in parts) == len(rows.visible):
        return replace(rows, prefill=PrefillRows(tuple(parts), None))
    at = torch.cat([torch.arange(part.first, part.first + part.count) for part in parts])
    host = rows.host
    if host is not None:
        visible = host.visible.copy()
        visible[at.numpy()] = 0
        host = replace(host, visible=visible)
    blind = rows.visible.index_fill(0, at.to(rows.visible.device), 0)
    others = replace(rows, visible=blind, host=host, prefill=None)
    return replace(rows, prefill=PrefillRows(tuple(parts), others))


def attend_in_parts(
    q_TQD: Tensor,
    prefill: PrefillRows,
    window: int | None,
    attend_others: Callable[[AttentionRows], Tensor],
    attend_part: Callable[[PrefillPart, Tensor], Tensor],
) -> Tensor:
    """`Ops.paged_attention` of a step with parts, from that of the others and of each part's queries.

    Raises ValueError in a layer with a window.
    """
    if window is not None:
        raise ValueError("a layer with a window has no block-sparse prompts")
    out_TQD = torch.empty_like(q_TQD) if prefill.others is None else attend_others(prefill.others)
    for part in prefill.parts:
        rows = slice(part.first, part.first + part.count)
        out_TQD[rows] = attend_part(part, q_TQD[rows])
    return out_TQD

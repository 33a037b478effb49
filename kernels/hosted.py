"""Layers whose K and V lie in another memory than attention reads: which keys are chosen ahead, and how they get there.

A layer has two pools of the same shape: its own (pages in host memory), and one that all such layers share in turn (on
the device). Attention runs over the shared one, under the same page ids; before it does, the keys that the step's rows
read are copied there, and what the step writes is copied back. So no kernel of attention knows of it. What is in
neither list may hold anything, another layer's keys too: a kernel that read it would be wrong.

A key's place in a pool is (page * K + kv head) * S + offset. Legend of shapes in ops.py and sparse.py; M places.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionRows, StepRows
from kernels.sparse import LAST_KEYS, SparseLayer
from kernels.sparse_keep import physical_ids

Pages = tuple[Tensor, Tensor]
"""k_pages and v_pages of one layer, of `Ops.allocate_kv`."""


@runtime_checkable
class Fetches(Protocol):
    """What a back end offers besides `Ops` whose layers may lie in another memory."""

    def choose_keys(
        self, q_TQD: Tensor, k_pages: Tensor, rows: AttentionRows, scale: float, layer: SparseLayer
    ) -> Tensor:
        """Choose for the step's DOUBLE_SPARSITY rows that see more keys than their budget, by q and the layer's labels.

        Attention of the same rows in a layer whose role for them is FOLLOW reads the choice, until the next one.
        q_TQD    need not be the layer's own query
        k_pages  tell the sizes; nothing is read from them, nor from the labels of a row's last LAST_KEYS keys
        Returns int32 or int64 [M], places of the keys that attention will read, the chosen ones at least; some may be
        named twice.
        The rows have room in `SparseRows.lists`. Raises ValueError if they are not as `kernels.sparse` says.
        """
        ...

    def copy_keys(self, source: Pages, target: Pages, places_M: Tensor) -> None:
        """Copy K and V of `places_M` to the same places of another pool. A back end may copy a slot's other heads, too.

        places_M  int32 or int64, on the device; the same one may come twice
        """
        ...


def chosen_places(rows: AttentionRows, num_kv: int, page_size: int) -> Tensor:
    """Places, int32 [M], of the keys that stand in `SparseRows.lists` for rows that see more than their budget."""
    sparse = rows.sparse
    assert sparse is not None
    assert sparse.lists is not None
    at = (sparse.index >= 0).nonzero()[:, 0]
    entries = sparse.index[at].long()
    budgets = sparse.budgets[entries]
    reads_less = rows.visible[at] > budgets
    at, entries, budgets = at[reads_less], entries[reads_less], budgets[reads_less]
    beyond = torch.arange(sparse.lists.shape[2], device=at.device) >= budgets.view(-1, 1, 1)
    indices = sparse.lists[entries].masked_fill(beyond, -1)
    table = rows.page_table[rows.row_seq[at].long()]
    # What stands behind a sequence's last page is never read: neither here.
    pages = torch.arange(table.shape[1], device=at.device) * page_size < rows.visible[at].unsqueeze(1)
    places = physical_ids(table.masked_fill(~pages, 0), indices, num_kv, page_size)
    return places[places >= 0]


class StepKeys:
    """Which keys a step reads in every such layer alike, and when the others can be chosen.

    pages       int64, ascending: ids of the pages with keys of earlier steps that rows read without choosing
    is_early    every row that chooses does so among keys of earlier steps alone: its span's earlier rows are among its
                last LAST_KEYS keys. So the choice may be made before the layer has written its keys
    has_choice  there is a row that chooses
    """

    def __init__(self, rows: AttentionRows, host: StepRows, page_size: int) -> None:
        index, budgets = _on_host(rows)
        chooses = (index >= 0) & (host.visible > budgets)
        self.has_choice = bool(chooses.any())
        seq, table = host.row_seq, host.page_table
        assert table is not None
        starts, ends = host.positions, host.visible
        if host.tree is not None and host.tree_starts is not None:
            starts, ends = (np.where(host.tree != 0, host.tree_starts, of_chain) for of_chain in (starts, ends))
        first_new = np.full(len(table), np.iinfo(np.int32).max, dtype=np.int32)
        np.minimum.at(first_new, seq, starts)
        self.is_early = not (chooses & (host.visible - LAST_KEYS > first_new[seq])).any()
        most = np.zeros(len(table), dtype=np.int32)
        np.maximum.at(most, seq, np.where(chooses, 0, np.minimum(ends, first_new[seq])))
        is_read = np.arange(table.shape[1]) * page_size < most[:, None]
        self.pages: NDArray[np.int64] = np.unique(table[is_read].astype(np.int64))

    def places(self, num_kv: int, page_size: int, device: torch.device) -> Tensor:
        """All places of `pages`, int64 [M]."""
        pages = torch.from_numpy(self.pages).to(device)
        return (pages.unsqueeze(1) * (num_kv * page_size) + torch.arange(num_kv * page_size, device=device)).flatten()


def _on_host(rows: AttentionRows) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Each row's entry among the sparse rows, -1 for none, and its budget."""
    if rows.sparse is None:
        none = np.full(len(rows.visible), -1, dtype=np.int32)
        return none, none
    index, budgets = rows.sparse.index.cpu().numpy(), rows.sparse.budgets.cpu().numpy()
    return index, np.where(index >= 0, budgets[np.maximum(index, 0)], 0) if len(budgets) else np.zeros_like(index)

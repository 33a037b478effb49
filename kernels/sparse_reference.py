"""Sparse attention in plain torch, a row at a time: the oracle of the compiled selections, and what runs without them.

A chosen row is a dense row of a shorter sequence: its keys, in ascending order, are all it sees.
Legend of shapes in ops.py and sparse.py; L keys a row sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hosted import chosen_places
from kernels.label_codes import decode, encode, num_bytes
from kernels.ops import AttentionRows
from kernels.sparse import FIRST_KEYS, LAST_KEYS, Method, Role, Roles, SparseLayer, SparseRows, sub_page


def allocate(
    k_pages: Tensor,
    roles: Roles,
    has_bounds: bool,
    channels_KC: Tensor | None,
    int4_labels: bool = False,
) -> SparseLayer:
    """bounds [P, K, N, 2, D] (smallest, largest) of N sub-pages and labels [P, K, S, C], of the pages' dtype; as codes
    of 4 bits [P, K, S, B] with scales [P, K, S]."""
    num_pages, num_kv, page_size, head_dim = k_pages.shape
    sub_pages = (num_pages, num_kv, page_size // sub_page(page_size), 2, head_dim)
    bounds = k_pages.new_empty(sub_pages) if has_bounds else None
    if channels_KC is None:
        return SparseLayer(roles, bounds)
    shape, num_channels = (num_pages, num_kv, page_size), channels_KC.shape[1]
    if not int4_labels:
        return SparseLayer(roles, bounds, k_pages.new_empty((*shape, num_channels)), channels_KC)
    codes = k_pages.new_empty((*shape, num_bytes(num_channels)), dtype=torch.uint8)
    return SparseLayer(roles, bounds, codes, channels_KC, k_pages.new_empty(shape, dtype=torch.bfloat16))


def write(layer: SparseLayer, k_pages: Tensor, slots_T: Tensor) -> None:
    """Metadata of keys that were just written."""
    page_size = k_pages.shape[2]
    pages, offsets = slots_T // page_size, slots_T % page_size
    if layer.bounds is not None:
        size = sub_page(page_size)
        complete = offsets % size == size - 1
        at, parts = pages[complete], offsets[complete] // size
        keys_TKsD = k_pages.view(*k_pages.shape[:2], -1, size, k_pages.shape[3])[at, :, parts]
        layer.bounds[at, :, parts] = torch.stack((keys_TKsD.amin(2), keys_TKsD.amax(2)), dim=2)
    if layer.labels is not None:
        assert layer.channels is not None
        channels_TKC = layer.channels.long().expand(len(slots_T), -1, -1)
        labels_TKC = k_pages[pages, :, offsets].gather(2, channels_TKC)
        if layer.label_scales is None:
            layer.labels[pages, :, offsets] = labels_TKC
        else:
            layer.labels[pages, :, offsets], layer.label_scales[pages, :, offsets] = encode(labels_TKC)


def attend(
    out_TQD: Tensor,
    q_TQD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
    scale: float,
    sparse: SparseRows,
    layer: SparseLayer,
) -> None:
    """Write the output of the sparse rows that do not read all their keys in this layer, and the lists of others."""
    for row in (sparse.index >= 0).nonzero()[:, 0].tolist():
        at = int(sparse.index[row])
        budget, visible = int(sparse.budgets[at]), int(rows.visible[row])
        role = layer.roles[int(sparse.methods[at])]
        if role is Role.DENSE or visible <= budget:
            continue
        page_size = k_pages.shape[2]
        table = rows.page_table[int(rows.row_seq[row]), : -(-visible // page_size)].long()
        k_KLD = k_pages[table].transpose(0, 1).flatten(1, 2)[:, :visible].float()
        q_KGD = q_TQD[row].view(k_KLD.shape[0], -1, q_TQD.shape[2]).float()
        method = Method(int(sparse.methods[at]))
        if role is Role.CHOOSE and method.is_of_pages:
            first_late = (visible - LAST_KEYS) // page_size
            scores_of = _bound_scores if method is Method.QUEST else _best_label_scores
            scores_KP = scores_of(q_KGD, table[1:first_late], page_size, layer)
            keys_Kn = _of_pages(_choose_pages(scores_KP, len(table), budget, page_size), page_size, visible)
        elif role is Role.CHOOSE:
            keys_Kn = _choose(_label_scores(q_KGD, table, visible, layer), budget)
        elif role is Role.LIST:
            assert sparse.lists is not None
            scores_KL = torch.matmul(q_KGD, k_KLD.transpose(1, 2)).amax(1)
            sparse.lists[at, :, :budget] = _choose(scores_KL, budget).int()
            continue
        else:
            assert sparse.lists is not None
            keys_Kn = sparse.lists[at, :, :budget].long()
        index_KnD = keys_Kn.unsqueeze(2).expand(-1, -1, k_KLD.shape[2])
        v_KLD = v_pages[table].transpose(0, 1).flatten(1, 2)[:, :visible].float()
        scores_KGn = torch.matmul(q_KGD, k_KLD.gather(1, index_KnD).transpose(1, 2)) * scale
        out_KGD = torch.matmul(torch.softmax(scores_KGn, dim=-1), v_KLD.gather(1, index_KnD))
        out_TQD[row] = out_KGD.flatten(0, 1).to(out_TQD.dtype)


def choose(q_TQD: Tensor, k_pages: Tensor, rows: AttentionRows, layer: SparseLayer) -> Tensor:
    """`hosted.Fetches.choose_keys`: into `SparseRows.lists`."""
    sparse, (num_kv, page_size) = rows.sparse, k_pages.shape[1:3]
    assert sparse is not None
    assert sparse.lists is not None
    for row in (sparse.index >= 0).nonzero()[:, 0].tolist():
        at = int(sparse.index[row])
        budget, visible = int(sparse.budgets[at]), int(rows.visible[row])
        if sparse.methods[at] == Method.DOUBLE_SPARSITY and visible > budget:
            table = rows.page_table[int(rows.row_seq[row]), : -(-visible // page_size)].long()
            q_KGD = q_TQD[row].view(num_kv, -1, q_TQD.shape[2]).float()
            sparse.lists[at, :, :budget] = _choose(_label_scores(q_KGD, table, visible, layer), budget).int()
    return chosen_places(rows, num_kv, page_size)


def _best(scores_KL: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of each kv head, ascending; of equals the lowest."""
    order = scores_KL.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def _choose(scores_KL: Tensor, budget: int) -> Tensor:
    """KV indices [K, budget], ascending, by the scores of all keys that the row sees."""
    num_kv, visible = scores_KL.shape
    chosen = FIRST_KEYS + _best(scores_KL[:, FIRST_KEYS : visible - LAST_KEYS], budget - FIRST_KEYS - LAST_KEYS)
    first = torch.arange(FIRST_KEYS, device=chosen.device).expand(num_kv, -1)
    last = torch.arange(visible - LAST_KEYS, visible, device=chosen.device).expand(num_kv, -1)
    return torch.cat((first, chosen, last), dim=1)


def _choose_pages(scores_KP: Tensor, num_pages: int, budget: int, page_size: int) -> Tensor:
    """Places in the page table [K, budget // S], ascending: the first page, the best of the P scored ones, all
    behind these. Scored pages end before the last LAST_KEYS keys begin."""
    first_late = 1 + scores_KP.shape[1]
    chosen = 1 + _best(scores_KP, budget // page_size - 1 - (num_pages - first_late))
    late = torch.arange(first_late, num_pages, device=chosen.device).expand(len(chosen), -1)
    return torch.cat((torch.zeros_like(chosen[:, :1]), chosen, late), dim=1)


def _bound_scores(q_KGD: Tensor, pages_P: Tensor, page_size: int, layer: SparseLayer) -> Tensor:
    """[K, P] of full pages. The bound of a sub-page is sum_d max(q_d min_d, q_d max_d) >= q.k of each of its keys; a
    page has the highest of its sub-pages' and of its group's heads'."""
    assert layer.bounds is not None
    bounds_KPN2D = layer.bounds[pages_P].transpose(0, 1).float()
    products = q_KGD[:, :, None, None, None] * bounds_KPN2D[:, None]
    return products.amax(4).sum(4).amax(3).amax(1)


def _best_label_scores(q_KGD: Tensor, pages_P: Tensor, page_size: int, layer: SparseLayer) -> Tensor:
    """[K, P] of full pages: each has the highest label score of its keys."""
    scores_KL = _label_scores(q_KGD, pages_P, len(pages_P) * page_size, layer)
    return scores_KL.view(len(scores_KL), len(pages_P), page_size).amax(2)


def _of_pages(pages_Kp: Tensor, page_size: int, visible: int) -> Tensor:
    """The keys of chosen pages. All heads' last page is the row's own, so all have as many."""
    keys = pages_Kp.unsqueeze(2) * page_size + torch.arange(page_size, device=pages_Kp.device)
    return keys.flatten(1)[:, : (pages_Kp.shape[1] - 1) * page_size + (visible - 1) % page_size + 1]


def _label_scores(q_KGD: Tensor, table: Tensor, visible: int, layer: SparseLayer) -> Tensor:
    """Highest q.k over the label channels of a group's heads, [K, L]."""
    assert layer.labels is not None
    assert layer.channels is not None
    labels_KLX = layer.labels[table].transpose(0, 1).flatten(1, 2)[:, :visible]
    q_KGC = q_KGD.gather(2, layer.channels.long().unsqueeze(1).expand(-1, q_KGD.shape[1], -1))
    if layer.label_scales is None:
        return torch.matmul(q_KGC, labels_KLX.float().transpose(1, 2)).amax(1)
    scales_KL = layer.label_scales[table].transpose(0, 1).flatten(1)[:, :visible].float()
    return torch.matmul(q_KGC, decode(labels_KLX, q_KGC.shape[2]).transpose(1, 2)).amax(1) * scales_KL

"""Attention of a step with sparse rows: the others as ever, and each sparse row to the list of its own keys.

A list is a page table. Seen as pages of one kv head each, the pool needs no kernel of its own for them: a list of pages
has pages of the pool's size, a list of keys has pages of one key, and a row of one kv head is a span of one row. Lists
ascend and end at the row itself, so that what it sees of them is a count again; all heads of a row list as many, and as
many at every layer. So the plan is made once a step from lengths the host knows, and a layer only rewrites the lists.

Legend of shapes in `kernels/ops.py`; R rows of one method that read less than they see, B most units of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.sparse import FIRST_KEYS, LAST_KEYS, Method, Role, SparseLayer, SparseRows, least_budget
from kernels.sparse_keep import physical_ids
from kernels.triton.paged import PagedAttention
from kernels.triton.sparse.label_codes import score_codes
from kernels.triton.sparse.scores import best_of_pages, score_keys, score_pages
from kernels.triton.sparse.top_k import select_top_k

_SCORE_BYTES = 256 << 20
"""Most memory for scores at a time: more rows are chosen for in turns."""
_KEYS_PER_SPLIT = 512


@dataclass
class Group:
    """The rows of one method whose budgets are less than what they see, and their lists.

    at, places  int64 [R]: rows of the step, entries of `SparseRows`; the others int32, [R]
    rows   the lists as rows for the paged kernel: [R K] of them, the ids of units as page table
    is_chosen   whether a layer of this step has made the lists (TIDAL)
    """

    at: Tensor
    places: Tensor
    row_seq: Tensor
    visible: Tensor
    budgets: Tensor
    most_visible: int
    rows: AttentionRows
    is_chosen: bool = False


@dataclass
class Step:
    """What one step's layers share. dense: the step's rows without those of some methods, made when first needed."""

    rows: AttentionRows
    groups: dict[Method, Group]
    dense: dict[frozenset[Method], AttentionRows | None] = field(default_factory=dict)

    def without(self, methods: frozenset[Method]) -> AttentionRows | None:
        """Rows of these methods see nothing; None if that leaves none."""
        if methods not in self.dense:
            at = torch.cat([self.groups[method].at for method in sorted(methods)])
            blind = self.rows.visible.index_fill(0, at, 0)
            r, whole = self.rows, len(at) == len(self.rows.visible)
            # Made anew, field by field: what else the step's rows carry is not true of these.
            others = AttentionRows(
                r.page_table, r.row_seq, r.positions, blind, r.slots, r.span_starts, r.tree, r.tree_starts
            )
            self.dense[methods] = None if whole else others
        return self.dense[methods]


class SparseAttention:
    """`Ops.paged_attention` of steps with sparse rows; `dense` runs the layers in which they read everything."""

    def __init__(
        self, dense: PagedAttention, num_sms: int, num_programs: int | None = None, deterministic: bool = False
    ) -> None:
        self._make = lambda: PagedAttention(num_sms, num_programs, deterministic)
        self._num_sms = num_sms
        # One for each set of rows that a step's layers attend with: each keeps its own plan from layer to layer.
        self._dense = {frozenset[Method](): dense}
        # Layers rewrite a step's lists under its plan: what they share is no prefix to plan by.
        self._lists = {method: PagedAttention(num_sms, num_programs, deterministic, cascade=False) for method in Method}
        self._step: Step | None = None

    def run(
        self,
        q_TQD: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: AttentionRows,
        scale: float,
        window: int | None,
        layer: SparseLayer,
    ) -> Tensor:
        """Raises ValueError on rows that cannot be sparse."""
        if window is not None:
            raise ValueError("a layer with a window has no sparse attention")
        assert rows.sparse is not None
        step, q_TQD = self._step_of(rows, rows.sparse, k_pages), q_TQD.contiguous()
        listing = frozenset(m for m in step.groups if layer.roles[m] in (Role.CHOOSE, Role.FOLLOW))
        others = step.without(listing) if listing else rows
        if others is None:
            out_TQD = torch.empty_like(q_TQD)
        else:
            if listing not in self._dense:
                self._dense[listing] = self._make()
            out_TQD = self._dense[listing].run(q_TQD, k_pages, v_pages, others, scale, None)
        for method, group in step.groups.items():
            role = layer.roles[method]
            if role is Role.DENSE:
                continue
            q_RQD = q_TQD.index_select(0, group.at)
            if role is not Role.FOLLOW:
                lists = _lists_of(rows.sparse) if method is Method.TIDAL else None
                self._choose(method, group, q_RQD, k_pages, rows, scale, layer, lists)
            elif not group.is_chosen:
                _follow(group, rows, rows.sparse, k_pages)
            if role is not Role.LIST:
                out_TQD.index_copy_(0, group.at, self._attend(method, group, q_RQD, k_pages, v_pages, scale))
        return out_TQD

    def choose(self, q_TQD: Tensor, k_pages: Tensor, rows: AttentionRows, scale: float, layer: SparseLayer) -> Tensor:
        """`hosted.Fetches.choose_keys`: the step's lists are where a layer that follows finds them."""
        assert rows.sparse is not None
        group = self._step_of(rows, rows.sparse, k_pages).groups.get(Method.DOUBLE_SPARSITY)
        if group is None:
            return torch.empty(0, dtype=torch.int32, device=q_TQD.device)
        q_RQD = q_TQD.contiguous().index_select(0, group.at)
        # Into `SparseRows.lists` too: who attends may have made these rows anew.
        self._choose(Method.DOUBLE_SPARSITY, group, q_RQD, k_pages, rows, scale, layer, _lists_of(rows.sparse))
        # Behind a list shorter than the longest stands place 0, which may be copied, too.
        return group.rows.page_table.view(-1)

    def _step_of(self, rows: AttentionRows, sparse: SparseRows, k_pages: Tensor) -> Step:
        if self._step is None or self._step.rows is not rows:
            self._step = make_step(rows, sparse, *k_pages.shape[:3])
        return self._step

    def _choose(
        self,
        method: Method,
        group: Group,
        q_RQD: Tensor,
        k_pages: Tensor,
        rows: AttentionRows,
        scale: float,
        layer: SparseLayer,
        lists: Tensor | None,
    ) -> None:
        """Rewrite the group's lists for this layer, and `lists`, the step's `SparseRows.lists`, where it is given."""
        num_kv, page_size = k_pages.shape[1:3]
        width = -(-group.most_visible // page_size) if method is Method.QUEST else group.most_visible
        ids_RKB = group.rows.page_table.view(len(q_RQD), num_kv, -1)
        indices = None if lists is None else lists.index_select(0, group.places)
        at_a_time = max(1, _SCORE_BYTES // (2 * num_kv * width))
        for start in range(0, len(q_RQD), at_a_time):
            part = slice(start, start + at_a_time)
            q, seq, visible, budgets = (x[part] for x in (q_RQD, group.row_seq, group.visible, group.budgets))
            scores = torch.empty((len(q), num_kv, width), dtype=torch.float16, device=q.device)
            splits = max(1, min(-(-4 * self._num_sms // (len(q) * num_kv)), group.most_visible // _KEYS_PER_SPLIT))
            if method is Method.QUEST:
                bounds = _present(layer.bounds, "bounds", method)
                score_pages(
                    q, bounds, rows.page_table, seq, visible, budgets, scores, scale, page_size, LAST_KEYS, splits
                )
            elif method is not Method.TIDAL and layer.label_scales is not None:
                score_codes(q, layer, rows.page_table, seq, visible, budgets, scores, scale, splits)
            else:
                keys = k_pages if method is Method.TIDAL else _present(layer.labels, "labels", method)
                channels = None if method is Method.TIDAL else layer.channels
                score_keys(q, keys, channels, rows.page_table, seq, visible, budgets, scores, scale, splits)
            if method is Method.DOUBLE_SPARSITY_PAGES:
                scores = best_of_pages(scores, visible, budgets, page_size, group.most_visible, LAST_KEYS)
            select_top_k(
                scores, rows.page_table, seq, visible, budgets, ids_RKB[part],
                None if indices is None else indices[part], page_size, method.is_of_pages, FIRST_KEYS, LAST_KEYS,
            )  # fmt: skip
        if lists is not None and indices is not None:
            lists.index_copy_(0, group.places, indices)
        group.is_chosen = True

    def _attend(
        self, method: Method, group: Group, q_RQD: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float
    ) -> Tensor:
        num_kv, page_size, head_dim = k_pages.shape[1:]
        unit = page_size if method.is_of_pages else 1
        k_one, v_one = (pool.view(-1, 1, unit, head_dim) for pool in (k_pages, v_pages))
        q_one = q_RQD.view(len(q_RQD) * num_kv, -1, head_dim)
        return self._lists[method].run(q_one, k_one, v_one, group.rows, scale, None).view(q_RQD.shape)


def make_step(rows: AttentionRows, sparse: SparseRows, num_pages: int, num_kv: int, page_size: int) -> Step:
    """Sort a step's sparse rows by method; two transfers from the device. Raises ValueError on rows that cannot be."""
    if num_pages * num_kv * page_size >= 1 << 31:
        raise ValueError(f"{num_pages} pages of {page_size} keys and {num_kv} heads are more than int32 lists can name")
    index, visible = torch.stack((sparse.index, rows.visible)).cpu().numpy()
    methods, budgets = torch.stack((sparse.methods, sparse.budgets)).cpu().numpy()
    if len(index) and int(index.max()) >= len(methods):
        raise ValueError(f"sparse.index names entry {int(index.max())} of {len(methods)}")
    if rows.tree is not None and bool((rows.tree[sparse.index >= 0] != 0).any()):
        raise ValueError("a row of a tree cannot be sparse")
    groups, sparse_rows = {}, np.flatnonzero(index >= 0)
    for method in Method:
        of_method = sparse_rows[methods[index[sparse_rows]] == method]
        budget = budgets[index[of_method]]
        least = least_budget(method, page_size)
        if len(budget) and int(budget.min()) < least:
            raise ValueError(f"a {method.name} row has a budget of {int(budget.min())} keys; it needs at least {least}")
        if method is Method.TIDAL and len(budget) and _lists_of(sparse).shape[2] < int(budget.max()):
            raise ValueError(f"sparse.lists has room for {_lists_of(sparse).shape[2]} keys of {int(budget.max())}")
        at = of_method[visible[of_method] > budget]
        if len(at):
            unit = page_size if method.is_of_pages else 1
            groups[method] = _make_group(rows, at, index[at], visible[at], budgets[index[at]], num_kv, unit)
    return Step(rows, groups)


def _make_group(
    rows: AttentionRows,
    at: NDArray[np.int64],
    places: NDArray[np.int32],
    visible: NDArray[np.int32],
    budgets: NDArray[np.int32],
    num_kv: int,
    unit: int,
) -> Group:
    """unit  keys of what a list names: pages or single keys."""
    units = budgets // unit
    # The last unit of a list is the row's own page, or the row itself.
    seen = np.repeat((units - 1) * unit + (visible - 1) % unit + 1, num_kv).astype(np.int32)
    device, num_lists = rows.visible.device, len(at) * num_kv
    ints = torch.from_numpy(np.stack((visible, budgets)).astype(np.int32)).to(device)
    longs = torch.from_numpy(np.stack((at, places)).astype(np.int64)).to(device)
    counted = torch.arange(num_lists + 1, dtype=torch.int32, device=device)
    lists = torch.from_numpy(seen).to(device)
    ids = torch.zeros((num_lists, int(units.max())), dtype=torch.int32, device=device)
    of_lists = AttentionRows(ids, counted[:-1], lists - 1, lists, counted[:-1].long(), counted)
    row_seq = rows.row_seq.index_select(0, longs[0])
    return Group(longs[0], longs[1], row_seq, ints[0], ints[1], int(visible.max()), of_lists)


def _follow(group: Group, rows: AttentionRows, sparse: SparseRows, k_pages: Tensor) -> None:
    """Lists that no layer of this step has made."""
    num_kv, page_size = k_pages.shape[1:3]
    ids = group.rows.page_table
    indices = _lists_of(sparse).index_select(0, group.places)[..., : ids.shape[1]]
    place = torch.arange(ids.shape[1], device=ids.device)
    indices = indices.masked_fill(place >= group.budgets.view(-1, 1, 1), 0)
    table = rows.page_table.index_select(0, group.row_seq)
    ids.copy_(physical_ids(table, indices, num_kv, page_size).view(ids.shape))


def _lists_of(sparse: SparseRows) -> Tensor:
    if sparse.lists is None:
        raise ValueError("rows that follow a list need sparse.lists")
    return sparse.lists


def _present(metadata: Tensor | None, name: str, method: Method) -> Tensor:
    if metadata is None:
        raise ValueError(f"a {method.name} row chooses in a layer without {name}")
    return metadata

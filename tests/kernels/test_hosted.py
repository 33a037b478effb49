"""Keys in another memory: what is chosen by a query that is not the layer's own, and what is copied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.hosted import Fetches, StepKeys
from kernels.kv_format import fill_with_nan
from kernels.ops import Ops, StepRows
from kernels.reference import ReferenceOps
from kernels.sparse import Method, Role
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_sparse import SHAPES, SparseWorld, Wish

FOLLOWS = (Role.DENSE, Role.FOLLOW, Role.DENSE, Role.DENSE)
WISHES = {0: Wish(Method.DOUBLE_SPARSITY, 80), 1: Wish(Method.DOUBLE_SPARSITY, 69)}
LENGTHS = [300, 170, 40]
LAST = {0: (297, 300), 1: (169, 170), 2: (39, 40)}

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="shows that compiled kernels do the same")
BACK_ENDS = [ReferenceOps, pytest.param(CpuOps, marks=needs_compiler)]


def filled(ops: Ops, shape: Shape, int4_labels: bool = False) -> SparseWorld:
    world = SparseWorld(ops, shape, LENGTHS, whole=True, int4_labels=int4_labels)
    for i, length in enumerate(LENGTHS):
        world.write(world.rows({i: (0, length)}, {}), {i: (0, length)})
    return world


@pytest.mark.parametrize("make", BACK_ENDS)
@pytest.mark.parametrize("int4_labels", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_choice_by_the_own_query_is_the_layers_choice(make: type[Ops], shape: Shape, int4_labels: bool) -> None:
    ops = make()
    world = filled(ops, shape, int4_labels)
    rows = world.rows(LAST, WISHES)
    q = world.write(rows, LAST)
    chosen = world.attend(q, rows, world.layer)
    assert isinstance(ops, Fetches)
    ops.choose_keys(q, world.k, rows, 0.1, world.layer)
    assert torch.equal(world.attend(q, rows, replace(world.layer, roles=FOLLOWS)), chosen)
    ops.choose_keys(-q, world.k, rows, 0.1, world.layer)
    assert not torch.allclose(world.attend(q, rows, replace(world.layer, roles=FOLLOWS)), chosen, atol=1e-3)


@pytest.mark.parametrize("make", BACK_ENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_nothing_but_the_fetched_keys_is_attention_over_all_pages(make: type[Ops], shape: Shape) -> None:
    """The buffer is full of NaN before."""
    ops = make()
    world = filled(ops, shape)
    rows = world.rows(LAST, WISHES)
    q = world.write(rows, LAST)
    buffer = ops.allocate_kv(len(world.k), shape.page_size, shape.num_kv, shape.head_dim, shape.dtype, world.k.device)
    for pages in buffer:
        fill_with_nan(pages)
    assert isinstance(ops, Fetches)
    chosen = ops.choose_keys(q, world.k, rows, 0.1, world.layer)
    # The dense row's sequence, whole.
    heads, pages = torch.arange(shape.num_kv * shape.page_size), torch.tensor(world.pages[2])
    dense = (pages.unsqueeze(1) * len(heads) + heads).flatten()
    ops.copy_keys((world.k, world.v), buffer, torch.cat((chosen, dense)))
    follows = replace(world.layer, roles=FOLLOWS)
    here = ops.paged_attention(q, *buffer, rows, 0.1, layer=follows)
    assert torch.equal(here, ops.paged_attention(q, world.k, world.v, rows, 0.1, layer=follows))
    assert not here.isnan().any()


def step(spans: list[tuple[int, int]], table: list[list[int]], trees: list[int] | None = None) -> StepRows:
    """Chains of KV indices [start, end); trees: per span, the KV index at which its tree begins, or -1."""
    row_seq = np.concatenate([np.full(end - start, i) for i, (start, end) in enumerate(spans)]).astype(np.int32)
    positions = np.concatenate([np.arange(*span) for span in spans]).astype(np.int32)
    tree = starts = None
    if trees is not None:
        starts = np.asarray(trees, dtype=np.int32)[row_seq]
        tree = (starts >= 0).astype(np.int64)
    bounds = np.cumsum([0, *(end - start for start, end in spans)]).astype(np.int32)
    page_table = np.asarray(table, dtype=np.int32)
    return StepRows(row_seq, positions, positions + 1, bounds, tree, starts, page_table)


def keys_of(host: StepRows, sparse: list[int], budget: int) -> StepKeys:
    """The rows of the spans in `sparse` have this budget."""
    shape = replace(SHAPES[0], page_size=8)
    world = SparseWorld(ReferenceOps(), shape, [8])
    rows = world.rows({0: (0, 1)}, {0: Wish(Method.DOUBLE_SPARSITY, budget)})
    index = torch.from_numpy(np.cumsum(np.isin(host.row_seq, sparse)) - 1).int()
    index[torch.from_numpy(~np.isin(host.row_seq, sparse))] = -1
    assert rows.sparse is not None
    num = int((index >= 0).sum())
    budgets = torch.full((num,), budget, dtype=torch.int32)
    chosen = replace(rows.sparse, index=index, budgets=budgets)
    return StepKeys(replace(rows, visible=torch.from_numpy(host.visible), sparse=chosen), host, 8)


def test_pages_of_rows_that_do_not_choose_are_those_of_earlier_steps() -> None:
    host = step([(20, 22), (100, 101), (0, 9)], [[5, 6, 7] + [0] * 10, [*range(10, 23)], [1, 2] + [0] * 11])
    keys = keys_of(host, [1], 70)
    assert keys.pages.tolist() == [5, 6, 7], "the chosen row's keys are sent for one by one, a first chunk has none"
    assert (keys.has_choice, keys.is_early) == (True, True)
    keys = keys_of(host, [1], 200)
    assert keys.pages.tolist() == [5, 6, 7, *range(10, 23)], "a row that sees no more than its budget reads all"
    assert not keys.has_choice


def test_a_tree_reads_what_is_before_it() -> None:
    host = step([(20, 24), (8, 9)], [[5, 6, 7], [3, 4, 0]], trees=[16, -1])
    assert keys_of(host, [], 70).pages.tolist() == [3, 5, 6]


def test_a_choice_waits_where_a_row_may_choose_a_key_of_its_own_step() -> None:
    table = [list(range(40))]
    assert keys_of(step([(100, 164)], table), [0], 70).is_early
    assert not keys_of(step([(100, 165)], table), [0], 70).is_early, "row 164 sees key 100 before its last 64"
    assert keys_of(step([(0, 70)], table), [0], 70).is_early, "none of these rows chooses"

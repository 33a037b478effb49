"""Steps with sparse rows, interpreted: each reads what the reference reads, whatever else is in the step.

Where lists are compared queries and keys are small integers: every sum is exact and equal scores are common.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kernels.blocks import PLAIN, AttentionBlock, AttentionForm, DenseLayers, MlpBlock
from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps
from kernels.sparse import FIRST_KEYS, LAST_KEYS, Method, Role, SparseLayer, SparseRows, least_budget
from kernels.triton.ops import TritonOps
from kernels.triton.paged import PagedAttention
from kernels.triton.sparse import attend, scores
from kernels.triton.sparse.attend import SparseAttention, make_step
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_sparse import SparseWorld, Wish
from tests.kernels.triton.worlds import poisoned

CHOOSE = (Role.CHOOSE, Role.CHOOSE, Role.LIST, Role.CHOOSE)
FOLLOW = (Role.CHOOSE, Role.CHOOSE, Role.FOLLOW, Role.CHOOSE)
SHAPE = Shape(num_q=4, num_kv=2, head_dim=16, page_size=4)
"""Small pages: the least budget of a QUEST row is 76 keys, not 112."""


class SparseOps(ReferenceOps):
    """The kernels' attention; keys and metadata are written by plain torch, which is faster here."""

    def __init__(self, num_programs: int = 2) -> None:
        super().__init__()
        self.dense = PagedAttention(1, num_programs)
        self.sparse = SparseAttention(self.dense, 1, num_programs)

    def paged_attention(
        self,
        q_TQD: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: AttentionRows,
        scale: float,
        window: int | None = None,
        form: AttentionForm = PLAIN,
        kv_scale_2K: Tensor | None = None,
        layer: SparseLayer | None = None,
    ) -> Tensor:
        with poisoned():
            if rows.sparse is None or layer is None:
                return self.dense.run(q_TQD, k_pages, v_pages, rows, scale, window, form, kv_scale_2K)
            return self.sparse.run(q_TQD, k_pages, v_pages, rows, scale, window, layer)


def filled(ops: ReferenceOps, shape: Shape, lengths: list[int], whole: bool = True) -> SparseWorld:
    """A world all of whose keys are written."""
    world = SparseWorld(ops, shape, lengths, whole=whole)
    for i, length in enumerate(lengths):
        world.write(world.rows({i: (0, length)}, {}), {i: (0, length)})
    return world


@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [(4, torch.float32)]
    + [pytest.param(page, dtype, marks=pytest.mark.slow) for page, dtype in ((7, torch.bfloat16), (16, torch.float32))],
)
def test_a_step_of_all_methods_and_dense_rows_reads_what_the_reference_reads(
    page_size: int, dtype: torch.dtype
) -> None:
    """A decode step of each, a verify span of two rows, rows whose budget is all they see, and a dense row."""
    shape = dataclasses.replace(SHAPE, page_size=page_size, dtype=dtype)
    lengths = [least_budget(Method.QUEST, page_size) + 30, 84, 95, 0, 40, 30]
    lengths[3] = least_budget(Method.DOUBLE_SPARSITY_PAGES, page_size) + 37
    spans = {i: (length - (2 if i == 0 else 1), length) for i, length in enumerate(lengths)}
    wishes = {i: Wish(method, least_budget(method, page_size) + 9 * i) for i, method in enumerate(Method)}
    wishes[4] = Wish(Method.TIDAL, 80)
    outs, lists = [], []
    for ops in (ReferenceOps(), SparseOps()):
        world = filled(ops, shape, lengths)
        rows = world.rows(spans, wishes)
        q = world.write(rows, spans)
        for roles in (CHOOSE, FOLLOW):
            outs.append(world.attend(q, rows, dataclasses.replace(world.layer, roles=roles)))
        lists.append(_sparse(rows).lists)
    bound = 2**-6 if dtype == torch.bfloat16 else 1e-5
    for expected, actual in zip(outs[:2], outs[2:], strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=bound, atol=bound)
    assert lists[0] is not None
    assert lists[1] is not None
    assert torch.equal(lists[0], lists[1])
    assert (lists[1][5] == -1).all(), "the row that reads all its keys has no list"


def test_rows_follow_the_lists_they_are_given() -> None:
    """In a step whose lists were made elsewhere."""
    world = filled(SparseOps(), SHAPE, [150])
    rows = world.rows({0: (149, 150)}, {0: Wish(Method.TIDAL, 69)})
    assert rows.sparse is not None
    assert rows.sparse.lists is not None
    keys = torch.cat((torch.arange(0, 8, 2), torch.arange(20, 21), torch.arange(86, 150)))
    rows.sparse.lists[:] = keys.int()
    q = world.write(rows, {0: (149, 150)})
    follow = dataclasses.replace(world.layer, roles=FOLLOW)
    expected = ReferenceOps().paged_attention(q, world.k, world.v, rows, 0.25, layer=follow)
    actual = world.ops.paged_attention(q, world.k, world.v, rows, 0.25, layer=follow)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", Method)
def test_mistake_7_lists_are_of_kv_heads_and_hold_what_any_head_of_the_group_needs(method: Method) -> None:
    """Head 0 looks for one key, head 1 for another, head 2 for none; values are one-hot, so what is read shows."""
    shape = Shape(num_q=3, num_kv=1, head_dim=64, page_size=4)
    length, needles = 100, {0: 17, 1: 29}
    ops = SparseOps()
    world = SparseWorld(ops, shape, [length], whole=True)
    qkv = world.qkv[0].view(length, 5, 64)
    qkv[:, 3:] = 0.0
    qkv[-1, :3] = 0.0
    for head, key in needles.items():
        channel = int(world.channels[0, head])
        qkv[-1, head, channel] = 1.0
        qkv[key, 3, channel] = 400.0
        qkv[key, 4, head] = 1.0
    world.write(world.rows({0: (0, length)}, {}), {0: (0, length)})
    budget = least_budget(method, 4) + (1 if not method.is_of_pages else 4)
    rows = world.rows({0: (length - 1, length)}, {0: Wish(method, budget)})
    q = world.write(rows, {0: (length - 1, length)})
    for roles in (CHOOSE, FOLLOW):
        out = world.attend(q, rows, dataclasses.replace(world.layer, roles=roles))[0]
    num_read = budget if not method.is_of_pages else (budget // 4 - 1) * 4 + (length - 1) % 4 + 1
    for head in needles:
        assert out[head, head] > 0.999, "the planted key is read"
        assert abs(float(out[2, head]) * num_read - 1) < 1e-4, "and by the group's other heads as one key of the list"
    step = ops.sparse._step
    assert step is not None
    group = step.groups[method]
    assert len(group.rows.page_table) == shape.num_kv, "one list for a kv head, not one for a query head"
    assert group.rows.page_table.shape[1] == (budget if not method.is_of_pages else budget // 4)


def test_mistake_8_scores_take_two_bytes_a_key_and_kv_head(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    real = scores.score_keys

    def spy(*args: object) -> None:
        made.extend(part for part in args if isinstance(part, Tensor) and part.dtype == torch.float16)
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(attend, "score_keys", spy)
    world = filled(SparseOps(), SHAPE, [150])
    world.sparse_step({0: (149, 150)}, {0: Wish(Method.DOUBLE_SPARSITY, 80)})
    assert world.layer.labels is not None
    label_bytes = 150 * world.layer.labels[0, :, 0].nbytes
    assert [tuple(part.shape) for part in made] == [(1, SHAPE.num_kv, 150)]
    assert made[0].nbytes < label_bytes


def test_mistake_11_a_layer_rewrites_lists_and_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step's first layers nothing is read back from the device: what follows could be captured."""
    ops = SparseOps(1)
    world = filled(ops, SHAPE, [77, 71, 9])
    spans = {0: (76, 77), 1: (70, 71), 2: (8, 9)}
    rows = world.rows(spans, {0: Wish(Method.QUEST, 76), 1: Wish(Method.TIDAL, 70)})
    q = world.write(rows, spans)
    layers = [
        dataclasses.replace(world.layer, roles=roles)
        for roles in ((Role.DENSE, Role.DENSE, Role.DENSE, Role.DENSE), CHOOSE, FOLLOW)
    ]
    first = [world.attend(q, rows, layer) for layer in layers]
    step = ops.sparse._step
    assert step is not None
    tables = {method: group.rows.page_table.data_ptr() for method, group in step.groups.items()}

    def refuse(*_: object) -> None:
        raise AssertionError("a plan is made, or a tensor read back, in the middle of a step")

    monkeypatch.setattr(PagedAttention, "_make", refuse)
    monkeypatch.setattr(attend, "make_step", refuse)
    monkeypatch.setattr(Tensor, "item", refuse)
    monkeypatch.setattr(Tensor, "tolist", refuse)
    monkeypatch.setattr(Tensor, "cpu", refuse)
    again = [ops.sparse.run(q, world.k, world.v, rows, 0.25, None, layer) for layer in layers]
    assert {method: group.rows.page_table.data_ptr() for method, group in step.groups.items()} == tables
    monkeypatch.undo()
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_many_rows_are_scored_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_SCORE_BYTES", 1)
    spans, wishes = {0: (88, 90)}, {0: Wish(Method.TIDAL, 75)}
    outs = [filled(ops, SHAPE, [90]).sparse_step(spans, wishes) for ops in (ReferenceOps(), SparseOps())]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


def test_a_budget_of_all_keys_is_dense() -> None:
    """Such rows are dense rows: of the same launch, so of the same bits."""
    world = filled(SparseOps(), SHAPE, [76, 80, 69], whole=False)
    spans = {0: (75, 76), 1: (79, 80), 2: (68, 69)}
    dense = world.sparse_step(spans, {})
    wishes = {0: Wish(Method.QUEST, 76), 1: Wish(Method.DOUBLE_SPARSITY, 80), 2: Wish(Method.TIDAL, 90)}
    assert torch.equal(world.sparse_step(spans, wishes), dense)


def test_a_list_of_all_pages_is_dense_within_rounding() -> None:
    """The launch of lists, told to list everything: attention through a list is attention."""
    world = filled(SparseOps(), SHAPE, [90], whole=False)
    rows = world.rows({0: (89, 90)}, {0: Wish(Method.QUEST, 76)})
    q = world.write(rows, {0: (89, 90)})
    dense = world.attend(q, dataclasses.replace(rows, sparse=None), world.layer)
    group = make_step(rows, _sparse(rows), *world.k.shape[:3]).groups[Method.QUEST]
    pages = rows.page_table[0, :23] * 2 + torch.arange(2).int()[:, None]
    lists = dataclasses.replace(group.rows, page_table=pages, visible=torch.full_like(group.rows.visible, 90))
    k, v = (pool.view(-1, 1, 4, 16) for pool in (world.k, world.v))
    listed = PagedAttention(1, 3).run(q.view(2, 2, 16), k, v, lists, 0.25, None).view(1, 4, 16)
    torch.testing.assert_close(listed, dense, rtol=1e-6, atol=1e-6)


def test_two_sequences_on_the_same_pages_choose_alike() -> None:
    world = filled(SparseOps(), SHAPE, [90, 90])
    spans, wishes = {0: (89, 90), 1: (89, 90)}, {i: Wish(Method.QUEST, 76) for i in range(2)}
    rows = world.rows(spans, wishes)
    table = rows.page_table.clone()
    table[1] = table[0]
    rows = dataclasses.replace(rows, page_table=table)
    q = world.write(world.rows({0: (89, 90)}, {}), {0: (89, 90)}).repeat(2, 1, 1)
    out = world.attend(q, rows, dataclasses.replace(world.layer, roles=CHOOSE))
    torch.testing.assert_close(out[0], out[1], rtol=1e-6, atol=1e-6)


def test_what_no_sparse_row_can_be_is_refused() -> None:
    world = filled(SparseOps(), SHAPE, [150])
    rows = world.rows({0: (149, 150)}, {0: Wish(Method.QUEST, 76)})
    sparse, q = _sparse(rows), torch.zeros(1, 4, 16)
    of_sparse: list[tuple[dict[str, Tensor | None], str]] = [
        ({"budgets": torch.tensor([75]).int()}, "QUEST row has a budget of 75 keys; it needs at least 76"),
        ({"index": torch.tensor([1]).int()}, "names entry 1 of 1"),
        ({"methods": torch.tensor([2]).int(), "lists": None}, "need sparse.lists"),
        ({"methods": torch.tensor([2]).int(), "lists": torch.zeros(1, 2, 9).int()}, "room for 9 keys of 76"),
    ]
    for change, message in of_sparse:
        wrong = dataclasses.replace(rows, sparse=dataclasses.replace(sparse, **change))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            world.attend(q, wrong, world.layer)
    with pytest.raises(ValueError, match="window"):
        world.ops.paged_attention(q, world.k, world.v, rows, 1.0, 7, layer=world.layer)
    with pytest.raises(ValueError, match="without bounds"):
        world.attend(q, rows, dataclasses.replace(world.layer, bounds=None))
    tree = dataclasses.replace(rows, tree=torch.ones(1).long(), tree_starts=torch.zeros(1).int())
    with pytest.raises(ValueError, match="tree cannot be sparse"):
        world.attend(q, tree, world.layer)
    with pytest.raises(ValueError, match="int32 lists can name"):
        make_step(rows, sparse, 1 << 28, 2, 4)


def _sparse(rows: AttentionRows) -> SparseRows:
    assert rows.sparse is not None
    return rows.sparse


def test_whole_layers_write_metadata_and_choose_by_it() -> None:
    """`TritonOps.dense_layers`: the end of a prompt and a decode step, against the reference's layers."""
    hidden, shape, twin = 32, SHAPE, ReferenceOps()
    angles = torch.randn(90, 8, generator=torch.Generator().manual_seed(1))
    table = torch.cat((angles.cos(), angles.sin()), 1)

    def weight(seed: int, *size: int) -> Tensor:
        return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * float(size[-1] ** -0.5)

    block = AttentionBlock(
        weight(1, hidden), twin.pack_linear(weight(2, 128, hidden)), twin.pack_linear(weight(3, hidden, 64)), None,
        None, shape.num_q, shape.num_kv, shape.head_dim, table, 1e-5, 0.25, None,
    )  # fmt: skip
    mlp = MlpBlock(
        weight(4, hidden), twin.pack_linear(weight(5, 64, hidden)), twin.pack_linear(weight(6, hidden, 32)), 1e-5
    )
    run = DenseLayers(((block, mlp), (dataclasses.replace(block, layer=1), mlp)))
    world = SparseWorld(twin, shape, [84, 74])
    x = weight(7, 158, hidden)
    wishes = {0: Wish(Method.QUEST, 76), 1: Wish(Method.DOUBLE_SPARSITY, FIRST_KEYS + LAST_KEYS + 3)}
    prompt, rest, step = (
        world.rows({0: first, 1: second}, wishes if first[0] == 83 else {})
        for first, second in (((0, 78), (0, 72)), ((78, 83), (72, 73)), ((83, 84), (73, 74)))
    )
    channels = torch.tensor([[3, 1, 7, 12], [0, 2, 9, 15]]).int()
    results = []
    for ops in (TritonOps(num_programs=2), twin):
        kv = [ops.allocate_kv(44, 4, 2, 16, torch.float32, torch.device("cpu")) for _ in range(2)]
        layers = [ops.allocate_sparse(pages[0], FOLLOW, True, channels) for pages in kv]
        metadata = [part for layer in layers for part in (layer.bounds, layer.labels)]
        for memory in (*(part for pages in kv for part in pages), *metadata):
            assert memory is not None
            memory.fill_(math.nan)
        twin.dense_layers(x[:150], run, kv, dataclasses.replace(prompt, layers=layers))
        ops.dense_layers(x[150:156], run, kv, dataclasses.replace(rest, layers=layers))
        results.append(ops.dense_layers(x[156:], run, kv, dataclasses.replace(step, layers=layers)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)

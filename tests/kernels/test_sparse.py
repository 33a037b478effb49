"""Sparse attention: what each row reads, by both back ends, and that nothing but its own keys decides it.

Scores must not differ by rounding where back ends are compared: there, queries and keys are small integers, so that
every sum is exact, whatever its order, and equal scores are common.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.cpu.build import best_variant, find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows, Ops
from kernels.reference import ReferenceOps
from kernels.sparse import (
    FIRST_KEYS,
    LAST_KEYS,
    Method,
    Role,
    SparseLayer,
    SparseRows,
    least_budget,
    roles_of_layers,
    sub_page,
)
from tests.kernels.cpu.worlds import Shape, World, rows_of

CHOOSES = (Role.CHOOSE, Role.CHOOSE, Role.DENSE, Role.CHOOSE)
NUM_CHANNELS = 5


def back_ends() -> list[object]:
    compiled = [] if find_compiler() is None else [best_variant(), "generic"]
    return [pytest.param(None, id="reference"), *compiled]


@pytest.fixture(scope="module", params=back_ends())
def ops(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param is None else CpuOps(num_threads=2, variant=request.param)


@dataclass(frozen=True)
class Wish:
    method: Method
    budget: int


class SparseWorld(World):
    """A `World` with metadata. Its cosines are 1, so that whole numbers stay whole."""

    def __init__(
        self,
        ops: Ops,
        shape: Shape,
        lengths: list[int],
        seed: int = 0,
        whole: bool = False,
        int4_labels: bool = False,
    ) -> None:
        super().__init__(ops, shape, lengths, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        if whole:
            half = shape.head_dim // 2
            self.cos_sin = torch.cat((torch.ones(max(lengths), half), torch.zeros(max(lengths), half)), dim=1)
            self.qkv = [torch.randint(-2, 3, qkv.shape, generator=generator).to(shape.dtype) for qkv in self.qkv]
        order = [torch.randperm(shape.head_dim, generator=generator) for _ in range(shape.num_kv)]
        self.channels = torch.stack(order)[:, :NUM_CHANNELS].int()
        self.layer = ops.allocate_sparse(self.k, CHOOSES, True, self.channels, int4_labels)
        for tensor in (self.layer.bounds, self.layer.labels, self.layer.label_scales):
            if tensor is not None:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    def rows(self, spans: dict[int, tuple[int, int]], wishes: dict[int, Wish]) -> AttentionRows:
        """Sequences with a wish are sparse in all their rows."""
        chosen = sorted(spans)
        rows = rows_of([spans[i] for i in chosen], [self.pages[i] for i in chosen], self.shape.page_size)
        if not wishes:
            return rows
        of_row = [i for i in chosen for _ in range(*spans[i])]
        sparse = [i for i in of_row if i in wishes]
        places = iter(range(len(sparse)))
        index = torch.tensor([next(places) if i in wishes else -1 for i in of_row], dtype=torch.int32)
        most = max(wish.budget for wish in wishes.values())
        return replace(
            rows,
            sparse=SparseRows(
                index,
                torch.tensor([wishes[i].method for i in sparse], dtype=torch.int32),
                torch.tensor([wishes[i].budget for i in sparse], dtype=torch.int32),
                torch.full((len(sparse), self.shape.num_kv, most), -1, dtype=torch.int32),
            ),
        )

    def write(self, rows: AttentionRows, spans: dict[int, tuple[int, int]]) -> Tensor:
        s = self.shape
        qkv = torch.cat([self.qkv[i][slice(*spans[i])] for i in sorted(spans)])
        return self.ops.qkv_rope_write(
            qkv, s.num_q, s.num_kv, s.head_dim, self.cos_sin, None, None, 1e-6, self.k, self.v, rows,
            layer=self.layer,
        )  # fmt: skip

    def attend(self, q: Tensor, rows: AttentionRows, layer: SparseLayer) -> Tensor:
        return self.ops.paged_attention(q, self.k, self.v, rows, self.shape.head_dim**-0.5, layer=layer)

    def sparse_step(self, spans: dict[int, tuple[int, int]], wishes: dict[int, Wish]) -> Tensor:
        """Write and attend; a TIDAL row lists the keys and then follows its list with the same query."""
        rows = self.rows(spans, wishes)
        q = self.write(rows, spans)
        out = self.attend(q, rows, replace(self.layer, roles=(Role.CHOOSE, Role.CHOOSE, Role.LIST, Role.CHOOSE)))
        if any(wish.method is Method.TIDAL for wish in wishes.values()):
            out = self.attend(q, rows, replace(self.layer, roles=(Role.CHOOSE, Role.CHOOSE, Role.FOLLOW, Role.CHOOSE)))
        return out


SHAPES = [
    Shape(num_q=6, num_kv=2, head_dim=64, page_size=32),
    Shape(num_q=4, num_kv=4, head_dim=40, page_size=16),
    Shape(num_q=3, num_kv=1, head_dim=24, page_size=7),
]


def budget_of(method: Method, page_size: int, more: int) -> int:
    return least_budget(method, page_size) + more


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: shows that compiled = reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_rows_read_the_keys_that_the_reference_reads(shape: Shape, dtype: torch.dtype) -> None:
    """Whole numbers: both see the same scores, many of them equal. One page more or less would show in the values."""
    shape = replace(shape, dtype=dtype)
    lengths = [700, 431, 300, 420, 250]
    spans = {0: (697, 700), 1: (430, 431), 2: (290, 300), 3: (418, 420), 4: (249, 250)}
    wishes = {i: Wish(method, budget_of(method, shape.page_size, 9 * i)) for i, method in enumerate(Method)}
    outs = []
    for ops in (ReferenceOps(), CpuOps(num_threads=2)):
        world = SparseWorld(ops, shape, lengths, whole=True)
        for i, length in enumerate(lengths):
            world.write(world.rows({i: (0, length)}, {}), {i: (0, length)})
        outs.append(world.sparse_step(spans, wishes))
    bound = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outs[0].float(), outs[1].float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("method", Method)
def test_a_budget_of_all_keys_is_dense_bit_for_bit(ops: Ops, method: Method) -> None:
    for shape in SHAPES:
        least, last = least_budget(method, shape.page_size), {0: (220, 260)}
        world = SparseWorld(ops, shape, [260])
        world.write(world.rows({0: (0, 260)}, {}), {0: (0, 260)})
        dense = world.sparse_step(last, {})
        assert torch.equal(world.sparse_step(last, {0: Wish(method, 260)}), dense)
        some = world.sparse_step(last, {0: Wish(method, least)})
        assert torch.equal(some[: least - 220], dense[: least - 220])
        assert not torch.allclose(some[-1], dense[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(find_compiler() is None, reason="plain torch promises no equal bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", Method)
def test_a_sparse_row_is_bitwise_the_same_alone_in_a_crowd_and_under_any_chunking(
    method: Method, dtype: torch.dtype
) -> None:
    """Also among dense rows, and with the keys behind it written already: a chunk has them, a decode step has not."""
    ops = CpuOps(num_threads=2)
    shape = replace(SHAPES[0], dtype=dtype)
    lengths = [210, 230, 5, 180]
    wishes = {i: Wish(m, budget_of(m, shape.page_size, 0)) for i, m in ((0, method), (1, Method.QUEST))}
    crowd_world = SparseWorld(ops, shape, lengths)
    crowd = crowd_world.sparse_step({i: (0, n) for i, n in enumerate(lengths)}, wishes)[:210]
    alone = SparseWorld(ops, shape, lengths)
    bounds = [0, 64, 150, 151, 160, 192, *range(193, 211)]
    parts = [alone.sparse_step({0: part}, {0: wishes[0]}) for part in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), crowd)


@pytest.mark.parametrize("method", Method)
def test_planted_needles_first_and_last_keys_are_read(ops: Ops, method: Method) -> None:
    """Values are one-hot by key, so that the output is the attention row: which keys were read can be seen."""
    shape = Shape(num_q=4, num_kv=1, head_dim=64, page_size=16)
    length, needles = 600, {0: 131, 1: 402}
    world = SparseWorld(ops, shape, [length], whole=True)
    qkv = world.qkv[0].view(length, 6, 64)
    qkv[:, 4] = 0.0
    qkv[:, 5] = 0.0
    for head, key in needles.items():
        channel = int(world.channels[0, head])
        qkv[-1, head] = 0.0
        qkv[-1, head, channel] = 1.0
        qkv[key, 4, channel] = 400.0
    for key in range(FIRST_KEYS):
        qkv[key, 5, key] = 1.0
    for key in range(length - LAST_KEYS + FIRST_KEYS, length):
        qkv[key, 5, key - (length - LAST_KEYS)] = 1.0
    qkv[-1, 2:4] = 0.0
    for key in needles.values():
        qkv[key, 5] = 0.5
    world.write(world.rows({0: (0, length)}, {}), {0: (0, length)})
    budget = budget_of(method, 16, 32)
    out = world.sparse_step({0: (length - 1, length)}, {0: Wish(method, budget)})[0]
    for head in needles:
        torch.testing.assert_close(out[head], torch.full((64,), 0.5), rtol=1e-3, atol=1e-3)
    # All other heads' scores are equal: what is read weighs 1 / (number of keys read).
    num_read = budget if not method.is_of_pages else (budget // 16 - 1) * 16 + (length - 1) % 16 + 1
    counted = out[2] * num_read - 0.5 * len(needles)
    torch.testing.assert_close(counted, torch.ones(64), rtol=1e-3, atol=1e-3)


def test_equal_scores_go_to_the_lowest_index_and_one_key_less_drops_the_lowest_score(ops: Ops) -> None:
    shape = Shape(num_q=2, num_kv=1, head_dim=16, page_size=16)
    length = 100
    world = SparseWorld(ops, shape, [length], whole=True)
    qkv = world.qkv[0].view(length, 4, 16)
    qkv[-1, :2] = 1.0
    qkv[:, 2] = 0.0
    qkv[20, 2] = -1.0
    world.write(world.rows({0: (0, length)}, {}), {0: (0, length)})
    for budget, missing in ((length - 1, {20}), (length - 3, {20, 35, 34}), (length - 4, {20, 35, 34, 33})):
        rows = world.rows({0: (length - 1, length)}, {0: Wish(Method.TIDAL, budget)})
        q = world.write(rows, {0: (length - 1, length)})
        world.attend(q, rows, replace(world.layer, roles=(Role.DENSE, Role.DENSE, Role.LIST, Role.DENSE)))
        assert rows.sparse is not None
        assert rows.sparse.lists is not None
        assert rows.sparse.lists[0, 0].tolist() == [key for key in range(length) if key not in missing]


def test_bounds_hold_for_every_key_of_a_complete_sub_page() -> None:
    """The last 3 keys complete none."""
    world = SparseWorld(ReferenceOps(), SHAPES[0], [128])
    q = world.write(world.rows({0: (0, 123)}, {}), {0: (0, 123)})
    assert world.layer.bounds is not None
    size, num_parts = sub_page(32), 0
    for number, part in ((page, part) for page in range(4) for part in range(32 // size)):
        low, high = world.layer.bounds[world.pages[0][number], 0, part]
        if number * 32 + (part + 1) * size > 123:
            assert low.isnan().all()
            continue
        best = torch.maximum(q[:, 0] * low, q[:, 0] * high).sum(1)
        exact = q[:, 0] @ world.k[world.pages[0][number], 0, part * size : (part + 1) * size].T
        assert (best >= exact.amax(1) - 1e-4).all()
        num_parts += 1
    assert num_parts == 15


@pytest.mark.parametrize(("page_size", "size"), [(4, 4), (16, 8), (32, 8), (64, 8), (12, 12), (24, 8)])
def test_a_page_that_does_not_divide_into_sub_pages_is_one(page_size: int, size: int) -> None:
    assert sub_page(page_size) == size


def test_a_needle_of_one_sub_page_is_read_where_bounds_of_the_whole_page_would_lose_it(ops: Ops) -> None:
    """Both halves of many pages have what the query asks for, in different keys: their extremes together promise more
    than any key has. The needle has all of it, and its page's other keys nothing."""
    shape = replace(SHAPES[0], num_q=1, num_kv=1, page_size=16)
    world = SparseWorld(ops, shape, [400])
    qkv = torch.zeros(400, 3, 64)
    decoys = torch.arange(400) % 16
    qkv[:, 1, :32] = torch.where(decoys == 3, 4.0, 0.0)[:, None]
    qkv[:, 1, 32:] = torch.where(decoys == 12, 4.0, 0.0)[:, None]
    qkv[160:176, 1] = 0.0
    qkv[165, 1] = 3.0
    qkv[399, 0] = 1.0
    qkv[:, 2, 0] = torch.arange(400.0) == 165
    half = shape.head_dim // 2
    world.cos_sin = torch.cat((torch.ones(400, half), torch.zeros(400, half)), dim=1)
    world.qkv[0] = qkv.flatten(1).to(shape.dtype)
    world.write(world.rows({0: (0, 399)}, {}), {0: (0, 399)})
    out = world.sparse_step({0: (399, 400)}, {0: Wish(Method.QUEST, least_budget(Method.QUEST, 16))})
    # One page is chosen of 19. A decoy promises 4 x 32, two of them in one bound 4 x 64, the needle 3 x 64.
    assert float(out[0, 0, 0]) > 0.9


@pytest.mark.parametrize("int4_labels", [False, True])
def test_metadata_of_moved_and_of_rewritten_keys_is_that_of_keys_written_once(ops: Ops, int4_labels: bool) -> None:
    """A rejected draft is overwritten; an accepted path of a tree moves; the rows behind read what they should."""
    shape, wishes = SHAPES[0], {0: Wish(Method.QUEST, 224)}
    plain = SparseWorld(ops, shape, [400], int4_labels=int4_labels)
    want = plain.sparse_step({0: (0, 400)}, wishes)[-1]
    labels = {0: Wish(Method.DOUBLE_SPARSITY, 80)}
    want_labels = plain.sparse_step({0: (399, 400)}, labels)[-1]
    world = SparseWorld(ops, shape, [400], int4_labels=int4_labels)
    world.write(world.rows({0: (0, 300)}, {}), {0: (0, 300)})
    true, world.qkv[0] = world.qkv[0], torch.randn_like(world.qkv[0]) * 9
    world.write(world.rows({0: (90, 160)}, {}), {0: (90, 160)})
    world.qkv[0] = true
    world.write(world.rows({0: (90, 158)}, {}), {0: (90, 158)})
    # Keys 158 and 159 arrive two slots later and are moved to where they belong.
    slots = world.rows({0: (0, 400)}, {}).slots
    rows = world.rows({0: (158, 160)}, {})
    world.write(replace(rows, slots=slots[160:162]), {0: (158, 160)})
    world.ops.move_kv(world.k, world.v, slots[160:162], slots[158:160], world.layer)
    world.write(world.rows({0: (160, 400)}, {}), {0: (160, 400)})
    torch.testing.assert_close(world.sparse_step({0: (399, 400)}, wishes)[-1], want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(world.sparse_step({0: (399, 400)}, labels)[-1], want_labels, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(find_compiler() is None, reason="the checks are of the compiled kernels' arguments")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": torch.tensor([100], dtype=torch.int32)}, "needs at least"),
        ({"index": torch.tensor([1], dtype=torch.int32)}, "names entry 1"),
        ({"index": torch.tensor([0, 0], dtype=torch.int32)}, "for each row"),
        ({"methods": torch.tensor([2], dtype=torch.int32), "lists": None}, "need sparse.lists"),
        ({"methods": torch.tensor([0])}, "int32"),
    ],
)
def test_the_compiled_kernels_refuse_sparse_rows_that_they_cannot_serve(
    change: dict[str, Tensor], message: str
) -> None:
    world = SparseWorld(CpuOps(num_threads=1), SHAPES[0], [300])
    rows = world.rows({0: (299, 300)}, {0: Wish(Method.QUEST, 224)})
    assert rows.sparse is not None
    q = torch.zeros(1, 6, 64)
    with pytest.raises((ValueError, TypeError), match=message):
        world.attend(q, replace(rows, sparse=replace(rows.sparse, **change)), world.layer)
    with pytest.raises(ValueError, match="window"):
        world.ops.paged_attention(q, world.k, world.v, rows, 1.0, 7, layer=world.layer)


def test_roles_of_layers_follow_the_published_methods() -> None:
    roles = roles_of_layers(8, 2, (5,))
    for method in (Method.QUEST, Method.DOUBLE_SPARSITY, Method.DOUBLE_SPARSITY_PAGES):
        assert [r[method] for r in roles] == [Role.DENSE] * 2 + [Role.CHOOSE] * 6
    list_, follow = Role.LIST, Role.FOLLOW
    assert [r[Method.TIDAL] for r in roles] == [Role.DENSE] * 2 + [list_, follow, follow, list_, follow, follow]

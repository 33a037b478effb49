"""Rows of draft trees, in both back ends, against attention written out key by key in float64; and moves of KV."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionRows, Ops
from kernels.reference import ReferenceOps
from tests.kernels.cpu.worlds import Shape

MASK_ALL = 1 << 30


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Hundreds of tiny tensors: torch's threads would cost more than they give, most on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "compiled", "generic"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "reference":
        return ReferenceOps()
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that compiled trees equal their definition")
    return CpuOps(num_threads=2, variant="generic" if request.param == "generic" else None)


@dataclass(frozen=True)
class Piece:
    """One sequence's span: `num_rows` rows after `start` keys; a tree where `parents` is not empty."""

    start: int
    num_rows: int
    mask_block: int = 1
    parents: tuple[int, ...] = ()

    def path(self, row: int) -> list[int]:
        """A tree row's ancestors and itself, from the root."""
        return paths(self.parents)[row]

    def position(self, row: int) -> int:
        return self.start + (len(self.path(row)) - 1 if self.parents else row)

    def visible(self, row: int) -> int:
        if self.parents:
            return self.start + row + 1
        end = ((self.start + row) // self.mask_block + 1) * self.mask_block
        return min(self.start + self.num_rows, end)

    def seen(self, window: int | None) -> Tensor:
        """Which keys each row sees, bool [rows, keys]: the definition."""
        num_keys = self.start + self.num_rows
        seen = torch.zeros(self.num_rows, num_keys, dtype=torch.bool)
        key_positions = torch.arange(num_keys)
        key_positions[self.start :] = torch.tensor([self.position(row) for row in range(self.num_rows)])
        for row in range(self.num_rows):
            if self.parents:
                seen[row, [*range(self.start), *(self.start + node for node in self.path(row))]] = True
            else:
                seen[row, : self.visible(row)] = True
            if window is not None:
                seen[row] &= key_positions > self.position(row) - window
        return seen


@functools.cache
def paths(parents: tuple[int, ...]) -> list[list[int]]:
    found: list[list[int]] = []
    for row, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), row])
    return found


def tree(generator: random.Random, start: int, num_nodes: int, reach: int = 64) -> Piece:
    """A random tree; `reach` 1 is a chain, a large one is bushy."""
    parents = [-1] + [generator.randrange(max(0, node - reach), node) for node in range(1, num_nodes)]
    return Piece(start, num_nodes, parents=tuple(parents))


class World:
    """Pieces over shuffled pages with NaN in every slot that nobody wrote, and the keys and values as written."""

    def __init__(self, ops: Ops, shape: Shape, pieces: list[Piece], seed: int = 0) -> None:
        self.ops, self.shape, self.pieces = ops, shape, pieces
        generator = torch.Generator().manual_seed(seed)
        ends = [piece.start + piece.num_rows for piece in pieces]
        num_pages = [-(-end // shape.page_size) for end in ends]
        order = torch.randperm(sum(num_pages) + 1, generator=generator).tolist()
        self.table = torch.full((len(pieces), max(num_pages) + 1), 2**30, dtype=torch.int32)  # past the end: not read
        for index, count in enumerate(num_pages):
            self.table[index, :count] = torch.tensor([order.pop() for _ in range(count)])
        device = torch.device("cpu")
        sizes = (sum(num_pages) + 1, shape.page_size, shape.num_kv, shape.head_dim)
        self.k, self.v = ops.allocate_kv(*sizes, shape.dtype, device)
        self.k.fill_(float("nan"))
        self.v.fill_(float("nan"))
        features = (shape.num_q + 2 * shape.num_kv) * shape.head_dim
        self.qkv = [torch.randn(end, features, generator=generator).to(shape.dtype) for end in ends]

    def rows(self, chosen: list[int], prefix: bool = False) -> AttentionRows:
        """The rows of some pieces, or the ones before them."""
        columns: list[tuple[int, ...]] = []
        bounds, page = [0], self.shape.page_size
        for place, index in enumerate(chosen):
            piece = self.pieces[index]
            for row in range(piece.start if prefix else piece.num_rows):
                key = row if prefix else piece.start + row
                is_tree = bool(piece.parents) and not prefix
                mask = sum(1 << node for node in piece.path(row)) if is_tree else 0
                signed = mask - (1 << 64) if mask >> 63 else mask
                slot = int(self.table[index, key // page]) * page + key % page
                position = row if prefix else piece.position(row)
                visible = key + 1 if prefix else piece.visible(row)
                columns.append((place, position, visible, slot, signed, piece.start))
            bounds.append(len(columns))
        row_seq, positions, ends, slots, masks, starts = (torch.tensor(column) for column in zip(*columns, strict=True))
        has_tree = bool((masks != 0).any())
        return AttentionRows(
            self.table[chosen], row_seq.int(), positions.int(), ends.int(), slots, torch.tensor(bounds).int(),
            masks if has_tree else None, starts.int() if has_tree else None,
        )  # fmt: skip

    def _write(self, qkv: Tensor, rows: AttentionRows) -> Tensor:
        s = self.shape
        half = torch.ones(512, s.head_dim // 2)
        unturned = torch.cat((half, half * 0), dim=1)
        args = (s.num_q, s.num_kv, s.head_dim, unturned, None, None, 1e-6, self.k, self.v, rows)
        return self.ops.qkv_rope_write(qkv, *args)

    def step(self, window: int | None = None, chosen: list[int] | None = None) -> Tensor:
        """Attention of the chosen pieces' rows (default: all) in one step."""
        chosen = list(range(len(self.pieces))) if chosen is None else chosen
        before = torch.cat([self.qkv[index][: self.pieces[index].start] for index in chosen])
        if len(before):
            self._write(before, self.rows(chosen, prefix=True))
        rows = self.rows(chosen)
        q = self._write(torch.cat([self.qkv[index][self.pieces[index].start :] for index in chosen]), rows)
        return self.ops.paged_attention(q, self.k, self.v, rows, self.shape.head_dim**-0.5, window)

    def expected(self, window: int | None = None) -> Tensor:
        s, out = self.shape, []
        for piece, qkv in zip(self.pieces, self.qkv, strict=True):
            heads = qkv.double().view(len(qkv), -1, s.head_dim)
            q, k, v = torch.split(heads, [s.num_q, s.num_kv, s.num_kv], dim=1)
            k, v = (part.repeat_interleave(s.num_q // s.num_kv, dim=1) for part in (k, v))
            scores = torch.einsum("rhd,khd->rhk", q[piece.start :], k) * s.head_dim**-0.5
            scores = scores.masked_fill(~piece.seen(window)[:, None], float("-inf"))
            out.append(torch.einsum("rhk,khd->rhd", scores.softmax(2), v))
        return torch.cat(out)


def crowd(seed: int) -> list[Piece]:
    """One step of everything: trees of all sizes, chains, prefill chunks, blocks."""
    generator = random.Random(seed)
    trees = [
        tree(generator, start, nodes, reach)
        for start, nodes, reach in [(40, 64, 64), (0, 9, 3), (131, 33, 5), (15, 2, 1), (16, 1, 1), (7, 64, 1)]
    ]
    others = [Piece(20, 1), Piece(31, 5), Piece(0, 70), Piece(9, 23), Piece(16, 16, 8), Piece(0, 19, MASK_ALL)]
    pieces = trees + others
    generator.shuffle(pieces)
    return pieces


SHAPES = [Shape(4, 4, 32, 16), Shape(12, 4, 64, 32), Shape(6, 2, 40, 7), Shape(8, 1, 48, 128), Shape(3, 1, 24, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 3, 21])
def test_a_step_of_trees_chains_chunks_and_blocks_equals_its_definition(
    ops: Ops, shape: Shape, dtype: torch.dtype, window: int | None
) -> None:
    world = World(ops, dataclasses.replace(shape, dtype=dtype), crowd(3))
    # float32 sums; bf16 rounds the weights of the values and the result, 2^-9 each of values up to about 4.
    bound = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(world.step(window).double(), world.expected(window), rtol=bound, atol=bound)


@pytest.mark.parametrize("seed", range(6))
def test_random_trees_equal_their_definition(ops: Ops, seed: int) -> None:
    generator = random.Random(seed)
    pieces = [
        tree(generator, generator.randrange(0, 200), generator.randint(1, 64), generator.choice([1, 2, 8, 64]))
        for _ in range(8)
    ]
    world = World(ops, Shape(4, 2, 16, generator.choice([1, 5, 16, 32, 100])), pieces, seed)
    torch.testing.assert_close(world.step().double(), world.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9])
def test_a_tree_is_bitwise_the_same_alone_and_in_a_crowd(dtype: torch.dtype, window: int | None) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that trees keep rule 1")
    for shape in (Shape(12, 4, 64, 16, dtype), Shape(3, 1, 40, 5, dtype)):
        pieces = crowd(8)
        together = World(CpuOps(num_threads=2), shape, pieces).step(window)
        bounds = torch.tensor([0, *(piece.num_rows for piece in pieces)]).cumsum(0).tolist()
        for index in range(len(pieces)):
            alone = World(CpuOps(num_threads=1), shape, pieces).step(window, [index])
            assert torch.equal(alone, together[bounds[index] : bounds[index + 1]])


def test_a_chain_written_as_a_tree_is_bitwise_the_chain(ops: Ops) -> None:
    shape = Shape(6, 2, 64, 16)
    chain, as_tree = Piece(37, 20), Piece(37, 20, parents=tuple(range(-1, 19)))
    for window in (None, 12):
        want = World(ops, shape, [chain, Piece(5, 1)]).step(window)
        assert torch.equal(World(ops, shape, [as_tree, Piece(5, 1)]).step(window), want)


def test_what_another_branch_holds_cannot_be_seen(ops: Ops) -> None:
    piece = Piece(10, 4, parents=(-1, 0, 0, 2))
    worlds = [World(ops, Shape(), [piece]) for _ in range(2)]
    worlds[1].qkv[0][11] *= 50  # node 1: a sibling of node 2, no ancestor of node 3
    first, second = (world.step() for world in worlds)
    assert torch.equal(first[[0, 2, 3]], second[[0, 2, 3]])
    assert not torch.equal(first[1], second[1])


def test_tree_masks_that_reach_outside_the_page_table_are_refused() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that the compiled kernels check tree masks")
    world = World(CpuOps(num_threads=1), Shape(), [Piece(10, 4, parents=(-1, 0, 0, 2))])
    rows = world.rows([0])
    assert rows.tree is not None
    assert rows.tree_starts is not None
    q = torch.zeros(4, 4, 64)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tree_starts": None}, ValueError, "come together"),
        ({"tree": rows.tree | 1 << 40}, ValueError, "reaches outside"),
        ({"tree": rows.tree | -(1 << 63)}, ValueError, "reaches outside"),
        ({"tree_starts": rows.tree_starts - 11}, ValueError, "reaches outside"),
        ({"tree": rows.tree[:3]}, ValueError, "has 3 entries"),
        ({"tree": rows.tree.int()}, TypeError, r"tree is torch\.int32"),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            world.ops.paged_attention(q, world.k, world.v, dataclasses.replace(rows, **change), 1.0)


def whole(pages: Tensor) -> Tensor:
    """All bytes of a KV tensor, padding included."""
    return torch.empty(0, dtype=torch.uint8).set_(pages.untyped_storage())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(2, 2, 17, 6)], ids=str)
def test_moves_copy_slots_in_order_and_touch_nothing_else(ops: Ops, shape: Shape, dtype: torch.dtype) -> None:
    shape = dataclasses.replace(shape, dtype=dtype)
    generator = random.Random(2)
    count = 3 * shape.page_size + 30
    moves = [
        ([4, 9, 10, 12], [3, 4, 9, 10]),  # a path moving to the front of its own sequence: sources become destinations
        ([5, 5, 6], [6, 7, 5]),
        ([generator.randrange(count) for _ in range(20)], [generator.randrange(count) for _ in range(20)]),
        ([], []),
    ]
    for sources, targets in moves:
        worlds = [World(ops, shape, [Piece(0, count)]) for _ in range(2)]
        holds = list(range(count))
        for world in worlds:
            whole(world.k).zero_()
            whole(world.v).zero_()
        slots = worlds[0].rows([0]).slots
        for source, target in zip(sources, targets, strict=True):
            holds[target] = holds[source]
        for world, content in zip(worlds, (list(range(count)), holds), strict=True):
            rows, s = world.rows([0]), shape
            table = torch.ones(512, s.head_dim // 2 * 2) * (torch.arange(s.head_dim // 2 * 2) < s.head_dim // 2)
            args = (s.num_q, s.num_kv, s.head_dim, table, None, None, 1e-6, world.k, world.v, rows)
            ops.qkv_rope_write(world.qkv[0][content], *args)
        moved, want = worlds
        ops.move_kv(moved.k, moved.v, slots[sources], slots[targets])
        assert torch.equal(whole(moved.k), whole(want.k))
        assert torch.equal(whole(moved.v), whole(want.v))


def test_moves_outside_the_pages_are_refused() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that the compiled kernels check slots")
    world, one = World(CpuOps(num_threads=1), Shape(), [Piece(0, 4)]), torch.tensor([1])
    for bad in (torch.tensor([-1]), torch.tensor([world.k.shape[0] * 16])):
        with pytest.raises(ValueError, match="to_slots has a slot outside"):
            world.ops.move_kv(world.k, world.v, one, bad)
        with pytest.raises(ValueError, match="from_slots has a slot outside"):
            world.ops.move_kv(world.k, world.v, bad, one)
    with pytest.raises(ValueError, match="1 slots cannot move to 2"):
        world.ops.move_kv(world.k, world.v, one, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="int32"):
        world.ops.move_kv(world.k, world.v, one, one.int())

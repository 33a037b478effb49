"""Plans in memory that stays: one set of launches serves every mix of spans, and reads nothing else of the step."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionRows, StepRows
from kernels.reference import ReferenceOps
from kernels.triton.fixed import fixed_layout
from kernels.triton.paged import PagedAttention
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_trees import MASK_ALL, Piece, World, tree
from tests.kernels.triton.worlds import AttentionOps, definition, errors_in_bounds

ROWS = 24
MIXES = [
    [Piece(33, 1), Piece(3, 1)],
    [tree(random.Random(1), 20, 8), Piece(0, 9, MASK_ALL)],
    [Piece(20, 22), Piece(4, 1)],
]


def padded(rows: AttentionRows, size: int) -> StepRows:
    """The rows on the host, filled up with rows that see nothing."""

    def fill(values: Tensor) -> NDArray[np.int32]:
        return torch.cat((values, values.new_zeros(size - len(values)))).numpy()

    assert rows.tree is None or rows.tree_starts is not None
    return StepRows(
        fill(rows.row_seq),
        fill(rows.positions),
        fill(rows.visible),
        np.append(rows.span_starts.numpy(), np.int32(size)),
        None if rows.tree is None else np.append(rows.tree.numpy(), np.zeros(size - len(rows.tree), np.int64)),
        None if rows.tree_starts is None else fill(rows.tree_starts),
    )


@pytest.mark.parametrize(("window", "group"), [(None, 4), (21, 2)])
def test_one_fixed_plan_serves_every_mix_of_spans(window: int | None, group: int) -> None:
    attention = PagedAttention(1, 2)
    worlds = [World(ReferenceOps(), Shape(group, 1, 16, 16), pieces) for pieces in MIXES]
    table = torch.zeros((8, 16), dtype=torch.int32)
    # Plans are made for the kinds of layer that have run.
    first = World(ReferenceOps(), Shape(group, 1, 16, 16), [Piece(0, 1)])
    attention.run(torch.zeros(1, group, 16), first.k, first.v, first.rows([0]), 0.25, window)
    # Everything but the table and the plan is poison: a kernel must read nothing of it.
    poison = torch.full((ROWS,), -7, dtype=torch.int32)
    static = AttentionRows(table, poison, poison, poison, poison.long(), poison)
    num_words = attention.plan_words(ROWS)
    words = torch.full((num_words,), -7, dtype=torch.int32)
    attention.fix_plans(static, words)
    for world in worlds:
        rows = world.rows(list(range(len(world.pieces))))
        world.step(window)  # writes the keys
        staged = np.full(num_words, -7, np.int32)
        attention.write_plans(padded(rows, ROWS), staged)
        words.copy_(torch.from_numpy(staged))
        table[: len(rows.page_table), : rows.page_table.shape[1]] = rows.page_table
        num_rows = len(rows.visible)
        q = torch.full((ROWS, group, 16), 3.0)
        q[:num_rows] = torch.cat(
            [qkv[piece.start :, : group * 16] for piece, qkv in zip(world.pieces, world.qkv, strict=True)]
        ).view(-1, group, 16)
        actual = attention.run(q, world.k, world.v, static, 16**-0.5, window)
        expected, mass = definition(world, window)
        assert errors_in_bounds(actual[:num_rows], expected, mass, 16).max() <= 1
        assert (actual[num_rows:] == 0).all(), "a padding row is not 0"
    layout = fixed_layout(ROWS, group, 1, 16, 4, window, 0, num_sms=1)
    short = padded(worlds[0].rows([0, 1]), ROWS - 1)
    with pytest.raises(ValueError, match="the step has 23 rows, its plan is for 24"):
        layout.write(short, staged)


def test_rows_that_come_with_their_host_copy_are_planned_from_it() -> None:
    world = World(AttentionOps(1), Shape(2, 1, 16, 16), MIXES[0])
    rows = world.rows([0, 1])
    q = torch.randn(2, 2, 16)
    world.step(None)
    expected = world.ops.paged_attention(q, world.k, world.v, rows, 1.0)
    host = padded(rows, 2)
    # On the device is what would be read back: it says nothing here.
    blind = dataclasses.replace(rows, visible=torch.zeros_like(rows.visible), host=host)
    assert torch.equal(world.ops.paged_attention(q, world.k, world.v, blind, 1.0), expected)

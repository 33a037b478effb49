"""Keys fetched from another memory, interpreted: attention over NaN and what was copied is attention over all keys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kernels.reference import ReferenceOps
from kernels.sparse import Method, Role
from kernels.triton.ops import TritonOps
from kernels.triton.sparse.fetch import copy_keys
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_sparse import SparseWorld, Wish

SHAPE = Shape(num_q=4, num_kv=2, head_dim=16, page_size=4)
FOLLOWS = (Role.DENSE, Role.FOLLOW, Role.DENSE, Role.DENSE)


@pytest.mark.parametrize("int4_labels", [False, True])
def test_a_choice_ahead_is_the_references_and_its_keys_are_all_that_is_read(int4_labels: bool) -> None:
    lengths, last = [90, 100], {0: (88, 90), 1: (99, 100)}
    wishes = {0: Wish(Method.DOUBLE_SPARSITY, 71), 1: Wish(Method.DOUBLE_SPARSITY, 80)}
    outs = []
    for ops in (TritonOps(num_programs=2), ReferenceOps()):
        world = SparseWorld(ReferenceOps(), SHAPE, lengths, whole=True, int4_labels=int4_labels)
        for i, length in enumerate(lengths):
            world.write(world.rows({i: (0, length)}, {}), {i: (0, length)})
        rows = world.rows(last, wishes)
        q = world.write(rows, last)
        k, v = (torch.full_like(pages, math.nan) for pages in (world.k, world.v))
        for turn in (q, -q):  # each layer chooses anew
            chosen = ops.choose_keys(turn, world.k, rows, 0.25, world.layer)
        ops.copy_keys((world.k, world.v), (k, v), chosen)
        follows = replace(world.layer, roles=FOLLOWS)
        outs.append(ops.paged_attention(q, k, v, rows, 0.25, layer=follows))
        again = replace(rows)  # the same rows, as who attends may have made them
        assert torch.equal(outs[-1], ops.paged_attention(q, k, v, again, 0.25, layer=follows))
        assert torch.equal(outs[-1], ops.paged_attention(q, world.k, world.v, rows, 0.25, layer=follows))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


def test_copies_end_where_the_places_end_and_pools_of_other_shapes_are_refused() -> None:
    source = tuple(torch.randn(5, 2, 4, 16) for _ in range(2))
    target = tuple(torch.full((5, 2, 4, 16), math.nan) for _ in range(2))
    places = torch.tensor([3, 39, 3, 17], dtype=torch.int32)
    copy_keys((source[0], source[1]), (target[0], target[1]), places)
    for pages, others in zip(source, target, strict=True):
        copied = ~others.view(-1, 16).isnan().any(1)
        assert copied.nonzero()[:, 0].tolist() == [3, 17, 39]
        assert torch.equal(others.view(-1, 16)[copied], pages.view(-1, 16)[copied])
    other = torch.empty(5, 2, 8, 16)
    with pytest.raises(ValueError, match="have no place"):
        copy_keys((source[0], source[1]), (other, other), places)

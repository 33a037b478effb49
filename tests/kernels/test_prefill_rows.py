"""Steps with regions of block-sparse prompts, on the back ends of a CPU: each row reads what the selectors say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.prefill_rows import PrefillPart, with_parts
from kernels.reference import ReferenceOps
from kernels.sparse_prefill import PermutedBlocks, XAttention, permuted_blocks, x_attention
from tests.kernels.cpu.worlds import Shape, World, rows_of

SHAPE = Shape(num_q=4, num_kv=2, head_dim=24, page_size=8)
X = XAttention(stride=4, tile=16, threshold=0.5)
P = PermutedBlocks(segment=32, tile=16, threshold=0.5, probe=9)
SCALE = 0.25
Spans = dict[int, tuple[int, int]]
Methods = dict[int, XAttention | PermutedBlocks]


@pytest.fixture(scope="module", params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param == "reference" else CpuOps(num_threads=2)


class Prompts(World):
    """A world whose keys are peaked, so that tiles differ; `attend` runs one step and returns its q, too."""

    def __init__(self, ops: Ops, shape: Shape, lengths: list[int]) -> None:
        super().__init__(ops, shape, lengths)
        for qkv in self.qkv:
            qkv[:, : (shape.num_q + shape.num_kv) * shape.head_dim] *= 1.6

    def attend(self, spans: Spans, methods: Methods) -> tuple[Tensor, Tensor]:
        s, chosen = self.shape, sorted(spans)
        rows = rows_of([spans[i] for i in chosen], [self.pages[i] for i in chosen], s.page_size)
        qkv = torch.cat([self.qkv[i][slice(*spans[i])] for i in chosen])
        q = self.ops.qkv_rope_write(
            qkv, s.num_q, s.num_kv, s.head_dim, self.cos_sin, None, None, 1e-6, self.k, self.v, rows
        )
        bounds = rows.span_starts.tolist()
        parts = [
            PrefillPart(bounds[at], spans[i][1] - spans[i][0], spans[i][0], at, methods[i])
            for at, i in enumerate(chosen)
            if i in methods
        ]
        rows = with_parts(rows, parts) if parts else rows
        return self.ops.paged_attention(q, self.k, self.v, rows, SCALE), q

    def keys_of(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, [N, K, D], from a back end whose pages lie open."""
        open_world = Prompts(ReferenceOps(), self.shape, [len(qkv) for qkv in self.qkv])
        open_world.attend({i: (0, len(self.qkv[i]))}, {})
        table = torch.tensor(open_world.pages[i])
        k, v = (
            pages[table].transpose(1, 2).flatten(0, 1)[: len(self.qkv[i])] for pages in (open_world.k, open_world.v)
        )
        return k, v


def masked(q: Tensor, k: Tensor, v: Tensor, seen_KTN: Tensor) -> Tensor:
    heads = q.double().view(len(q), k.shape[1], -1, q.shape[2])
    scores = torch.einsum("tkgd,nkd->ktgn", heads, k.double()) * SCALE
    weights = scores.masked_fill(~seen_KTN.unsqueeze(2), -math.inf).softmax(3)
    return torch.einsum("ktgn,nkd->tkgd", weights, v.double()).flatten(1, 2).float()


def seen_by_x(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    rows, keys = torch.arange(start, end), torch.arange(end)
    keep = x_attention(q, k, start, X, SCALE)
    assert not keep[:, -1].all(), "something is left out, or this shows nothing"
    return keep[:, rows // 16 - start // 16][:, :, keys // 16] & (keys <= rows.unsqueeze(1))


def seen_by_p(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    rows, keys = torch.arange(start, end), torch.arange(end)
    found = permuted_blocks(q, k, start, P, SCALE)
    assert not found.keep[:, -1].all(), "something is left out, or this shows nothing"
    seen = ((keys // 32 == rows.unsqueeze(1) // 32) & (keys <= rows.unsqueeze(1))).repeat(2, 1, 1)
    for head in range(2):
        for place, old in enumerate(found.order_KN[head].tolist()):
            seen[head, :, old] |= found.keep[head, rows // 16 - start // 16, place // 16]
    return seen


def test_each_part_reads_what_its_selector_keeps_and_the_others_are_as_ever(ops: Ops) -> None:
    """Two prompts' parts, one of them in the middle, another prompt's chunk and a decode: one step."""
    world = Prompts(ops, SHAPE, [150, 150, 40, 33])
    world.attend({0: (0, 96), 1: (0, 64), 2: (0, 20), 3: (0, 32)}, {})
    spans: Spans = {0: (96, 150), 1: (64, 128), 2: (20, 40), 3: (32, 33)}
    out, q = world.attend(spans, {0: X, 1: P})
    dense, _ = world.attend(spans, {})
    assert torch.equal(out[118:], dense[118:])
    k, v = world.keys_of(0)
    torch.testing.assert_close(out[:54], masked(q[:54], k, v, seen_by_x(q[:54], k, 96, 150)), rtol=1e-5, atol=1e-5)
    k, v = (part[:128] for part in world.keys_of(1))
    expected = masked(q[54:118], k, v, seen_by_p(q[54:118], k, 64, 128))
    torch.testing.assert_close(out[54:118], expected, rtol=1e-5, atol=1e-5)
    assert (out[:118] - dense[:118]).abs().max() > 0.05
    # Company and cuts at tiles change no bit.
    alone, _ = world.attend({0: (96, 112)}, {0: X})
    assert torch.equal(alone, out[:16])
    alone, _ = world.attend({0: (112, 150)}, {0: X})
    assert torch.equal(alone, out[16:54])
    alone, _ = world.attend({1: (64, 128)}, {1: P})
    assert torch.equal(alone, out[54:118])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [12, 24, 64])
def test_a_threshold_of_one_is_dense(ops: Ops, dtype: torch.dtype, head_dim: int) -> None:
    world = Prompts(ops, replace(SHAPE, head_dim=head_dim, dtype=dtype), [150])
    world.attend({0: (0, 64)}, {})
    dense, _ = world.attend({0: (64, 150)}, {})
    out, _ = world.attend({0: (64, 150)}, {0: replace(X, threshold=1.0)})
    assert torch.equal(out, dense)
    # In another order of keys the sums are others.
    out, _ = world.attend({0: (64, 150)}, {0: replace(P, threshold=1.0)})
    bound = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(out, dense, rtol=bound, atol=bound)


@pytest.mark.parametrize("method", [X, P])
def test_a_needle_in_the_first_tiles_is_read(ops: Ops, method: XAttention | PermutedBlocks) -> None:
    """The last rows look for the keys of one early group; everything else is noise to them."""
    world = Prompts(ops, SHAPE, [160])
    heads, dim = SHAPE.num_q + 2 * SHAPE.num_kv, SHAPE.head_dim
    qkv = world.qkv[0].view(160, heads, dim)
    world.cos_sin = torch.cat((torch.ones(160, dim // 2), torch.zeros(160, dim // 2)), dim=1)  # no rotation
    needle = torch.randn(dim, generator=torch.Generator().manual_seed(2))
    qkv[40:44, SHAPE.num_q : SHAPE.num_q + SHAPE.num_kv] = 3 * needle
    qkv[128:, : SHAPE.num_q] = needle
    world.attend({0: (0, 128)}, {})
    dense, _ = world.attend({0: (128, 160)}, {})
    out, _ = world.attend({0: (128, 160)}, {0: method})
    torch.testing.assert_close(out, dense, rtol=1e-3, atol=1e-3)


def test_a_step_of_parts_alone_computes_no_other_row(ops: Ops) -> None:
    world = Prompts(ops, SHAPE, [64])
    rows = rows_of([(32, 64)], world.pages, SHAPE.page_size)
    found = with_parts(rows, [PrefillPart(0, 16, 32, 0, X), PrefillPart(16, 16, 48, 0, X)])
    assert found.prefill is not None
    assert found.prefill.others is None
    some = with_parts(rows, [PrefillPart(16, 16, 48, 0, X)]).prefill
    assert some is not None
    assert some.others is not None
    assert some.others.visible.tolist() == [*range(33, 49), *[0] * 16]


def test_what_cannot_be_is_refused(ops: Ops) -> None:
    world = Prompts(ops, SHAPE, [64])
    rows = rows_of([(0, 64)], world.pages, SHAPE.page_size)
    q = torch.randn(64, SHAPE.num_q, SHAPE.head_dim)
    parts = with_parts(rows, [PrefillPart(0, 64, 0, 0, X)])
    with pytest.raises(ValueError, match="window"):
        ops.paged_attention(q, world.k, world.v, parts, SCALE, window=5)
    odd = with_parts(rows, [PrefillPart(0, 64, 0, 0, XAttention(4, 4, 0.5))])
    with pytest.raises(ValueError, match="pages of 8 keys do not divide tiles of 4"):
        ops.paged_attention(q, world.k, world.v, odd, SCALE)

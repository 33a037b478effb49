"""Kernels of block-sparse prefill, interpreted, against their twins, and whole chunks against masked attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import sparse_prefill
from kernels.sparse_keep import MASS_ONE, to_mass
from kernels.sparse_prefill import PermutedBlocks, XAttention, group_limits, query_tiles
from kernels.triton.paged import PagedAttention
from kernels.triton.sparse import permute, prefill
from kernels.triton.sparse import tile_mass as tile_mass_kernels
from tests.kernels.triton.sparse_worlds import Pool, guarded, unharmed
from tests.kernels.triton.worlds import errors_in_bounds, poisoned

X = XAttention(stride=4, tile=16, threshold=0.5)
P = PermutedBlocks(segment=32, tile=16, threshold=0.7, probe=9)


def chunk(
    start: int, end: int, dtype: torch.dtype = torch.float32, page: int = 16, group: int = 3
) -> tuple[Tensor, Pool]:
    """Rows of a chunk and the pool of its sequence; slots past its end are NaN."""
    pool = Pool([end], 2, group, 16, page, dtype)
    pool.k.mul_(2)
    pool.keys[0].mul_(2)
    generator = torch.Generator().manual_seed(end)
    return torch.randn(end - start, 2 * group, 16, generator=generator).to(dtype), pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "end"), [(0, 70), (19, 70), (65, 67)])
def test_masses_are_those_of_the_twin(start: int, end: int, dtype: torch.dtype) -> None:
    q, pool = chunk(start, end, dtype)
    tiles = query_tiles(start, end, 16)
    counts, limits = torch.tensor(tiles).int() + 1, group_limits(start, end, 4, 16)
    with poisoned():
        mass = tile_mass_kernels.tile_mass(q, pool.k, pool.table[0], limits, counts, start, 4, 4, 0.3, tiles.stop)
    expected = sparse_prefill.tile_mass(q, pool.keys[0], limits, counts, start, 4, 4, 0.3)
    ranked = torch.arange(tiles.stop) < counts.view(1, -1, 1)
    assert int((mass - expected).masked_fill(~ranked, 0).abs().max()) <= MASS_ONE >> 18
    assert (mass.masked_fill(ranked, -7) == -7).all()


@pytest.mark.parametrize(("threshold", "block"), [(0.5, 64), (0.9, 16), (1.0, 64)])
def test_kept_tiles_are_those_of_the_twin(threshold: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_mass_kernels, "_BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor([1, 20, 33]).int()
    logits = torch.randint(0, 4, (2, 3, 33), generator=generator).float()
    mass = to_mass(logits.masked_fill(torch.arange(33) >= counts.view(1, -1, 1), -math.inf).softmax(2))
    mass[1, 1] = 0  # nothing was scored: everything is kept (mistake 9)
    forced = torch.randint(-1, 20, (2, 3, 2), generator=generator).int()
    expected = sparse_prefill.keep_tiles(mass, counts, forced, threshold)
    with poisoned():
        tiles, lengths = tile_mass_kernels.keep_tiles(mass, counts, forced, threshold)
    assert torch.equal(lengths, expected.sum(2).int())
    assert int(lengths[1, 1]) == 20
    for head in range(2):
        for place in range(3):
            wanted = expected[head, place].nonzero()[:, 0].int()
            assert torch.equal(tiles[head, place, : len(wanted)], wanted)
            assert (tiles[head, place, len(wanted) :] == -7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_is_that_of_the_twin(dtype: torch.dtype) -> None:
    q, pool = chunk(95, 111, dtype)
    with poisoned():
        found = permute.importance(q, pool.k, pool.table[0], 96, 0.3)
    expected = sparse_prefill.importance(q, pool.keys[0][:96], 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_sorted_copies_are_a_bijection_inside_each_segment() -> None:
    values = torch.randint(0, 5, (2, 128), generator=torch.Generator().manual_seed(1)).float()
    pool = Pool([130], 2, 1, 24, 16)
    with poisoned():
        order = permute.segment_order(values, 64)
    assert torch.equal(order, sparse_prefill.segment_order(values, 64))
    assert torch.equal(order.view(2, 2, 64).sort(2).values[1, 1], torch.arange(64, 128).int())
    (k, more), (v, _) = (guarded(2, 140, 24, dtype=torch.float32) for _ in range(2))
    permute.copy_keys(pool.k, pool.v, pool.table[0], order, 0, 128, k, v)
    assert unharmed(more)
    gathered = pool.keys[0].transpose(0, 1).gather(1, order.long().unsqueeze(2).expand(-1, -1, 24))
    assert torch.equal(k[:, :128], gathered)
    assert k[:, 128:].isnan().all()
    permute.copy_keys(pool.k, pool.v, pool.table[0], None, 64, 66, k, v)
    assert torch.equal(k[:, :66], pool.keys[0][64:].transpose(0, 1))
    pages, offsets = pool.slots[64:] // 16, pool.slots[64:] % 16
    assert torch.equal(v[:, :66], pool.v[pages, :, offsets].transpose(0, 1))


def masked_attention(q: Tensor, pool: Pool, seen_KTN: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention, mass of it), float64 [T, Q, D], over the keys that each row of a kv head's group sees."""
    heads = q.double().view(len(q), pool.num_kv, -1, pool.head_dim)
    pages, offsets = pool.slots // pool.page, pool.slots % pool.page
    values = pool.v[pages, :, offsets].double()
    scores = torch.einsum("tkgd,nkd->ktgn", heads, pool.keys[0].double()) * scale
    weights = scores.masked_fill(~seen_KTN.unsqueeze(2), -math.inf).softmax(3)
    out, mass = (torch.einsum("ktgn,nkd->tkgd", weights, part).flatten(1, 2) for part in (values, values.abs()))
    return out, mass


def seen_of(keep: Tensor, start: int, end: int, tile: int) -> Tensor:
    """Which keys each row sees through kept tiles, bool [K, T, N], causal."""
    rows, keys = torch.arange(start, end), torch.arange(end)
    return keep[:, rows // tile - start // tile][:, :, keys // tile] & (keys <= rows.unsqueeze(1))


def assert_close(actual: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    assert errors_in_bounds(actual, *expected, actual.shape[2], 16.0).max() <= 1


@pytest.mark.parametrize(
    ("start", "end", "dtype", "page"),
    [
        (0, 70, torch.float32, 16),
        pytest.param(50, 102, torch.bfloat16, 4, marks=pytest.mark.slow),
        (129, 130, torch.float16, 8),
    ],
)
def test_x_attention_reads_the_listed_tiles(start: int, end: int, dtype: torch.dtype, page: int) -> None:
    q, pool = chunk(start, end, dtype, page)
    kept = sparse_prefill.x_attention(q, pool.keys[0], start, X, 0.25)
    with poisoned():
        out = prefill.x_attention(PagedAttention(1, 2), q, pool.k, pool.v, pool.table[0], start, X, 0.25)
    assert_close(out, masked_attention(q, pool, seen_of(kept, start, end, 16), 0.25))
    if end - start > 1:
        assert not kept[:, -2, :-1].all(), "something is left out, or this shows nothing"


def test_x_attention_at_a_threshold_of_one_is_dense() -> None:
    q, pool = chunk(40, 70)
    every = XAttention(4, 16, 1.0)
    out = prefill.x_attention(PagedAttention(1, 2), q, pool.k, pool.v, pool.table[0], 40, every, 0.25)
    causal = (torch.arange(70) <= torch.arange(40, 70).unsqueeze(1)).expand(2, -1, -1)
    assert_close(out, masked_attention(q, pool, causal, 0.25))


@pytest.mark.parametrize(
    ("start", "end", "dtype", "page"),
    [pytest.param(0, 70, torch.float32, 16, marks=pytest.mark.slow),
     pytest.param(75, 110, torch.bfloat16, 7, marks=pytest.mark.slow),
     (3, 31, torch.float32, 16), (96, 97, torch.float16, 16)],
)  # fmt: skip
def test_permuted_blocks_read_the_sorted_tiles_they_keep_and_their_own_segment(
    start: int, end: int, dtype: torch.dtype, page: int
) -> None:
    q, pool = chunk(start, end, dtype, page)
    found = sparse_prefill.permuted_blocks(q, pool.keys[0], start, P, 0.25)
    with poisoned():
        out = prefill.permuted_blocks(PagedAttention(1, 2), q, pool.k, pool.v, pool.table[0], start, P, 0.25)
    rows = torch.arange(start, end)
    keys = torch.arange(end)
    seen = ((keys // 32 == rows.unsqueeze(1) // 32) & (keys <= rows.unsqueeze(1))).repeat(2, 1, 1)
    of_row = rows // 16 - start // 16
    for head in range(2):
        for place, old in enumerate(found.order_KN[head].tolist()):
            seen[head, :, old] |= found.keep[head, of_row, place // 16]
    assert_close(out, masked_attention(q, pool, seen, 0.25))


def test_permuted_blocks_at_a_threshold_of_one_are_dense() -> None:
    """Attention does not mind the order of keys; what is behind the rows is NaN and stays unread."""
    q, pool = chunk(50, 70)
    every = PermutedBlocks(32, 16, 1.0)
    out = prefill.permuted_blocks(PagedAttention(1, 2), q, pool.k, pool.v, pool.table[0], 50, every, 0.25)
    causal = (torch.arange(70) <= torch.arange(50, 70).unsqueeze(1)).expand(2, -1, -1)
    assert_close(out, masked_attention(q, pool, causal, 0.25))


def test_pages_that_do_not_divide_a_tile_are_refused() -> None:
    q, pool = chunk(0, 40, page=7)
    with pytest.raises(ValueError, match="do not divide tiles of 16"):
        prefill.x_attention(PagedAttention(1, 1), q, pool.k, pool.v, pool.table[0], 0, X, 0.25)
    with pytest.raises(ValueError, match="do not hold whole groups of 4"):
        prefill.x_attention_lists(q, pool.k, pool.table[0], 0, X, 0.25)

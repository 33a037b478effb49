"""Selectors of block-sparse prefill: what they promise, against definitions written out score by score."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.sparse_keep import MASS_ONE
from kernels.sparse_prefill import (
    PermutedBlocks,
    XAttention,
    group_limits,
    importance,
    permuted_blocks,
    pool_queries,
    query_tiles,
    segment_counts,
    segment_order,
    sink_tiles,
    tile_mass,
    x_attention,
)

X = XAttention(stride=4, tile=16, threshold=0.8)
P = PermutedBlocks(segment=32, tile=16, threshold=0.8, probe=9)


def chunk(start: int, end: int, num_kv: int = 2, group: int = 3, head_dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(end)
    q = torch.randn(end, num_kv * group, head_dim, generator=generator)
    return q[start:], torch.randn(end, num_kv, head_dim, generator=generator) * 2


def test_the_mass_of_a_tile_is_its_share_of_antidiagonal_scores() -> None:
    """Group i of rows against group j < i of keys: sums of q[i s + s - 1 - p] . k[j s + p], one phase p at a time."""
    start, end, stride, tile = 19, 70, 4, 16
    q, k = chunk(start, end)
    tiles = query_tiles(start, end, tile)
    counts = torch.tensor(tiles).int() + 1
    mass = tile_mass(q, k, group_limits(start, end, stride, tile), counts, start, stride, tile // stride, 0.3)
    assert mass.shape == (2, len(tiles), tiles.stop)
    for head in range(2):
        for place, query_tile in enumerate(tiles):
            wanted, num = torch.zeros(tiles.stop, dtype=torch.float64), 0
            for i in range(query_tile * 4, query_tile * 4 + 4):
                if i * stride < start or (i + 1) * stride > end:
                    continue
                for member in range(3):
                    sums = [
                        sum(
                            float(q[i * stride + stride - 1 - p - start, head * 3 + member].double()
                                  @ k[j * stride + p, head].double())
                            for p in range(stride)
                        )
                        for j in range(i)
                    ]  # fmt: skip
                    share = (torch.tensor(sums, dtype=torch.float64) * 0.3 / stride).softmax(0)
                    for j in range(i):
                        wanted[j // 4] += share[j]
                    num += 1
            found = mass[head, place].double() / MASS_ONE
            torch.testing.assert_close(found, wanted / max(1, num), rtol=0, atol=1e-6)
            assert num == 0 or abs(float(found.sum()) - 1) < 1e-5


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 16), (5, 70), (64, 65), (33, 129)])
def test_lists_hold_the_sink_and_the_rows_own_tile_and_nothing_later(start: int, end: int) -> None:
    q, k = chunk(start, end)
    kept = x_attention(q, k, start, X, 0.3)
    for place, tile in enumerate(query_tiles(start, end, 16)):
        assert kept[:, place, [0, tile]].all()
        assert not kept[:, place, tile + 1 :].any()


def test_a_threshold_of_one_keeps_every_tile() -> None:
    q, k = chunk(0, 100)
    kept = x_attention(q, k, 0, XAttention(4, 16, 1.0), 0.3)
    assert all(kept[:, tile, : tile + 1].all() for tile in range(7))
    order = permuted_blocks(q, k, 0, PermutedBlocks(32, 16, 1.0), 0.3)
    assert all(order.keep[:, tile, : tile // 2 * 2].all() for tile in range(7))


def test_mistake_9_rows_that_give_no_estimate_read_everything() -> None:
    """Three rows hold no whole group of four, so no tile gets mass and no threshold is ever reached."""
    q, k = chunk(65, 68)
    assert x_attention(q, k, 65, X, 0.3).all()


def test_keys_behind_the_rows_decide_nothing() -> None:
    q, k = chunk(0, 128)
    kept = x_attention(q, k, 0, X, 0.3)
    k[64:] = math.nan
    assert torch.equal(x_attention(q[:64], k[:64], 0, X, 0.3), kept[:, :4, :4])


def test_lists_are_the_same_however_a_prompt_is_cut_at_tiles() -> None:
    q, k = chunk(0, 128)
    whole = x_attention(q, k, 0, X, 0.3)
    for start, end in ((0, 48), (48, 64), (64, 128)):
        part = x_attention(q[start:end], k[:end], start, X, 0.3)
        assert torch.equal(part, whole[:, start // 16 : end // 16, : end // 16])


def test_planted_tiles_are_kept_and_most_others_are_not() -> None:
    q, k = chunk(0, 256)
    q[:, :3], k[:, 0] = q[:, :3] * 0.1, k[:, 0] * 0.1
    q[128:, :3, 0], k[80:96, 0, 0] = 6.0, 6.0
    kept = x_attention(q, k, 0, XAttention(4, 16, 0.9), 1.0)[0, 8:]
    assert kept[:, 5].all()
    assert not kept[:, [1, 2, 3, 4, 6, 7]].any()


def test_importance_is_the_mean_of_softmaxed_scores() -> None:
    q, k = chunk(50, 60)
    found = importance(q, k[:40], 0.3)
    for head in range(2):
        scores = torch.einsum("rgd,nd->rgn", q[:, head * 3 : head * 3 + 3].double(), k[:40, head].double()) * 0.3
        torch.testing.assert_close(found[head].double(), scores.softmax(2).mean((0, 1)), rtol=1e-5, atol=1e-7)


def test_an_order_permutes_inside_segments_by_falling_importance_with_ties_to_the_first() -> None:
    values = torch.randint(0, 4, (3, 96), generator=torch.Generator().manual_seed(1)).float()
    order = segment_order(values, 32)
    for head in range(3):
        for start in range(0, 96, 32):
            wanted = sorted(range(start, start + 32), key=lambda n: (-float(values[head, n]), n))
            assert order[head, start : start + 32].tolist() == wanted


def test_sorting_gathers_heavy_keys_into_few_tiles() -> None:
    """Every eighth key is heavy: in their own order all tiles hold some, sorted half of them hold all."""
    q, k = chunk(0, 288)
    k[:, 0] *= 0.1
    k[::8, 0, 0] = 9.0
    q[..., 0] = 2.0
    found = permuted_blocks(q[256:], k, 256, PermutedBlocks(64, 16, 0.9, 32), 1.0)
    assert found.keep[0, 0].view(4, 4).sum(1).tolist() == [1, 1, 1, 1]


def test_the_tile_of_key_0_is_kept_wherever_it_went() -> None:
    q, k = chunk(0, 100)
    k[0] = -k[32:64].mean(0) * 3
    found = permuted_blocks(q, k, 0, PermutedBlocks(32, 16, 0.01), 0.3)
    for head in range(2):
        tile = int((found.order_KN[head] == 0).nonzero()) // 16
        assert found.keep[head, 2:, tile].all()
    assert torch.equal(sink_tiles(found.order_KN, 1, P)[:, 0, 0], (found.order_KN == 0).int().argmax(1) // 16)


def test_sorted_lists_are_the_same_however_a_prompt_is_cut_if_the_probe_is() -> None:
    """Cuts at segments. What is probed are the last rows of a chunk, so here they are all alike."""
    q, k = chunk(0, 160)
    q[:] = q[:1]
    whole = permuted_blocks(q, k, 0, P, 0.3)
    part = permuted_blocks(q[96:], k, 96, P, 0.3)
    assert torch.equal(part.order_KN, whole.order_KN)
    assert torch.equal(part.keep, whole.keep[:, 6:])


def test_the_first_segment_has_nothing_to_choose() -> None:
    q, k = chunk(3, 30)
    found = permuted_blocks(q, k, 3, P, 0.3)
    assert found.order_KN.shape == (2, 0)
    assert found.keep.shape == (2, 2, 0)
    assert segment_counts(30, 70, P).tolist() == [0, 2, 2, 4]


def test_query_tiles_are_pooled_from_the_rows_they_have() -> None:
    q, _ = chunk(5, 37)
    pooled = pool_queries(q, 5, 16)
    for place, (begin, end) in enumerate([(5, 16), (16, 32), (32, 37)]):
        torch.testing.assert_close(pooled[place], q[begin - 5 : end - 5].mean(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: XAttention(stride=3, tile=128), "divisor"),
        (lambda: XAttention(tile=96, stride=16), "power of two"),
        (lambda: XAttention(threshold=0.0), "threshold is"),
        (lambda: PermutedBlocks(segment=64, tile=128), "segment is 64"),
        (lambda: PermutedBlocks(probe=0), "probe is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()

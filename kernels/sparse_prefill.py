"""Block-sparse prefill: which key tiles a tile of query rows reads, by two methods, in plain torch.

A chunk is the rows [start, end) of one sequence, causal, its keys written. Query tiles and key tiles are the `tile`
positions from multiples of `tile` on, so it is the sequence that decides which rows share a list, not the cuts of
chunks; a chunk that starts inside a tile estimates that tile from the rows it has. A list is of a (query tile, kv
head): masses are means over the heads of a group. All lists hold a sink and the tiles of the rows themselves.

Legend: T rows of the chunk, Q query heads, K kv heads, G = Q / K, D head size, N keys, QT / KT query / key tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sparse_keep import keep_mass, mass_target, to_mass


@dataclass(frozen=True)
class XAttention:
    """Xu et al., "XAttention" (2025), algorithm 1: sums along antidiagonals, one of `stride` x `stride` scores.

    Departures: a query group sees the key groups before its own (its own tile is always kept), so that no score is of a
    later key; groups that a chunk does not hold whole are left out; one list per kv head.
    """

    stride: int = 16
    tile: int = 128
    threshold: float = 0.9

    def __post_init__(self) -> None:
        mass_target(self.threshold)
        if self.stride < 1 or self.tile % self.stride or self.tile & (self.tile - 1):
            raise ValueError(f"tile is {self.tile}, stride is {self.stride}: a power of two and a divisor of it")


@dataclass(frozen=True)
class PermutedBlocks:
    """Wang et al., "PBS-Attn" (2025): keys are sorted inside segments, so that heavy keys share few tiles.

    probe  the last so many rows of the chunk say which keys are heavy
    Departures: sorted copies are of the segments before a query's own, which is read in its own order and so needs no
    other mask than a row's count of keys; mean over a group's heads, one order and one list per kv head.
    """

    segment: int = 256
    tile: int = 128
    threshold: float = 0.9
    probe: int = 128

    def __post_init__(self) -> None:
        mass_target(self.threshold)
        if self.segment < self.tile or self.segment & (self.segment - 1) or self.tile & (self.tile - 1):
            raise ValueError(f"segment is {self.segment}, tile is {self.tile}: powers of two, a segment of whole tiles")
        if self.probe < 1:
            raise ValueError(f"probe is {self.probe}; it must be at least 1 row")


def query_tiles(start: int, end: int, tile: int) -> range:
    """The tiles that hold the rows [start, end)."""
    return range(start // tile, (end - 1) // tile + 1)


def group_limits(start: int, end: int, stride: int, tile: int) -> Tensor:
    """How many key groups each query group of the chunk's tiles sees, int32 [QT tile / stride]; 0: it is not whole."""
    tiles = query_tiles(start, end, tile)
    group = torch.arange(tiles.start * tile // stride, tiles.stop * tile // stride)
    whole = (group * stride >= start) & ((group + 1) * stride <= end)
    return torch.where(whole, group, 0).int()


def tile_mass(
    q_TQD: Tensor, k_NKD: Tensor, limits: Tensor, counts: Tensor, first: int, stride: int, group_tile: int, scale: float
) -> Tensor:
    """Mass that each query tile gives to each key tile, int32 [K, QT, KT] in units of `sparse_keep.MASS_ONE`.

    A query group is `stride` rows, a key group `stride` keys; their score is the mean along the antidiagonal. A group's
    softmax is over the key groups that it sees, a tile's mass the mean over its groups and heads.
    q_TQD   row 0 stands at `first`, at or behind the first tile's start
    limits  as `group_limits`; counts int32 [QT], tiles to be ranked: mass behind them is 0, as it is for a query tile
            without a whole group
    """
    num_key_groups = int(limits.max()) if len(limits) else 0
    logits = None
    if num_key_groups:
        # Queries of a group stand against its keys in reverse: the sum along the antidiagonal is one product.
        q_KRC = reversed_groups(q_TQD, k_NKD.shape[1], limits, first, stride, group_tile).float()
        logits = torch.matmul(q_KRC, key_groups(k_NKD, num_key_groups, stride).float().transpose(1, 2))
    return mass_of_scores(logits, k_NKD.shape[1], limits, counts, group_tile, scale / stride)


def reversed_groups(q_TQD: Tensor, num_kv: int, limits: Tensor, first: int, stride: int, group_tile: int) -> Tensor:
    """The whole query groups, rows from last to first: [K, G * I, stride * D]."""
    first_group = first // (stride * group_tile) * group_tile
    whole = (limits > 0).nonzero()[:, 0]
    last = (first_group + whole + 1) * stride - 1 - first
    rows = q_TQD[last.unsqueeze(1) - torch.arange(stride, device=last.device)]
    by_group = rows.view(len(whole), stride, num_kv, -1, q_TQD.shape[2]).permute(2, 3, 0, 1, 4)
    return by_group.reshape(num_kv, -1, stride * q_TQD.shape[2])


def key_groups(k_NKD: Tensor, num_key_groups: int, stride: int) -> Tensor:
    """[K, J, stride * D]"""
    return k_NKD[: num_key_groups * stride].transpose(0, 1).reshape(k_NKD.shape[1], num_key_groups, -1)


def mass_of_scores(
    scores_KRJ: Tensor | None, num_kv: int, limits: Tensor, counts: Tensor, group_tile: int, scale: float
) -> Tensor:
    """`tile_mass` from the sums along antidiagonals of whole groups, [K, G * I, J]; None = there is none."""
    num_tiles = int(counts.max())
    mass = torch.zeros((num_kv, len(counts), num_tiles), dtype=torch.int32, device=counts.device)
    if scores_KRJ is None:
        return mass
    whole, width = (limits > 0).nonzero()[:, 0], scores_KRJ.shape[2]
    seen = torch.arange(width, device=limits.device) < limits[whole].unsqueeze(1)
    logits = (scores_KRJ * scale).view(num_kv, -1, len(whole), width).masked_fill(~seen, float("-inf"))
    p = torch.zeros((num_kv, len(limits), num_tiles * group_tile), device=limits.device)
    p[:, whole, :width] = logits.softmax(3).mean(1)
    of_tiles = p.view(num_kv, len(counts), group_tile, num_tiles, group_tile).sum((2, 4))
    whole_groups = (limits > 0).view(len(counts), group_tile).sum(1).clamp_min(1)
    mass += to_mass(of_tiles / whole_groups.view(1, -1, 1))
    return mass.masked_fill(torch.arange(num_tiles, device=counts.device) >= counts.view(1, -1, 1), 0)


def keep_tiles(mass_KQT: Tensor, counts: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """`sparse_keep.keep_mass` of each (kv head, query tile), and the tiles `forced` [K, QT, 2] (-1: none); bool."""
    num_kv, _, num_tiles = mass_KQT.shape
    kept = keep_mass(mass_KQT.flatten(0, 1), counts.repeat(num_kv), threshold).view(mass_KQT.shape)
    index = torch.arange(num_tiles, device=mass_KQT.device)
    kept = kept | (index == forced.unsqueeze(3)).any(2)
    return kept & (index < counts.view(1, -1, 1))


def x_attention(q_TQD: Tensor, k_NKD: Tensor, start: int, method: XAttention, scale: float) -> Tensor:
    """Which key tiles each query tile reads, bool [K, QT, KT]; the last of a query tile is its own."""
    end, tiles, device = start + len(q_TQD), query_tiles(start, start + len(q_TQD), method.tile), q_TQD.device
    counts = (torch.tensor(tiles).int() + 1).to(device)
    limits = group_limits(start, end, method.stride, method.tile).to(device)
    mass = tile_mass(q_TQD, k_NKD, limits, counts, start, method.stride, method.tile // method.stride, scale)
    return keep_tiles(mass, counts, x_forced(k_NKD.shape[1], tiles).to(device), method.threshold)


def x_forced(num_kv: int, tiles: range) -> Tensor:
    """The tile of key 0 and the query tile's own, [K, QT, 2]."""
    own = torch.tensor(tiles).int()
    return torch.stack((torch.zeros_like(own), own), dim=1).repeat(num_kv, 1, 1)


def importance(q_RQD: Tensor, k_NKD: Tensor, scale: float) -> Tensor:
    """Mean over rows and a group's heads of the softmax over all these keys, float32 [K, N]."""
    num_kv, head_dim = k_NKD.shape[1:]
    q = (q_RQD.float() * scale).view(len(q_RQD), num_kv, -1, head_dim)
    return torch.einsum("rkgd,nkd->kgrn", q, k_NKD.float()).softmax(3).mean((1, 2))


def segment_order(importance_KN: Tensor, segment: int) -> Tensor:
    """Keys of each segment by falling importance, of equals the lowest first: int32 [K, N], the old index of each."""
    num_kv, num_keys = importance_KN.shape
    inside = importance_KN.view(num_kv, -1, segment).sort(dim=2, descending=True, stable=True).indices
    return (inside + torch.arange(0, num_keys, segment, device=inside.device).view(1, -1, 1)).flatten(1).int()


def pool_queries(q_TQD: Tensor, start: int, tile: int) -> Tensor:
    """Mean of the rows of each query tile, [QT, Q, D] in q's dtype; the first and the last may lack rows."""
    bounds = [max(start, at * tile) - start for at in query_tiles(start, start + len(q_TQD), tile)]
    ends = [*bounds[1:], len(q_TQD)]
    means = [q_TQD[begin:end].mean(0, dtype=torch.float32) for begin, end in zip(bounds, ends, strict=True)]
    return torch.stack(means).to(q_TQD.dtype)


@dataclass(frozen=True)
class PermutedTiles:
    """What `permuted_blocks` chose.

    order_KN  old index of each sorted key; complete segments before the last row's own
    keep      bool [K, QT, KT]: sorted tiles that each query tile reads, before its own segment. That it reads, too, in
              its own order and up to the row itself
    """

    order_KN: Tensor
    keep: Tensor


def segment_counts(start: int, end: int, method: PermutedBlocks) -> Tensor:
    """Tiles before the segment of each query tile, int32 [QT]."""
    tiles = torch.tensor(query_tiles(start, end, method.tile)).int()
    per_segment = method.segment // method.tile
    return tiles // per_segment * per_segment


def sink_tiles(order_KN: Tensor, num_query_tiles: int, method: PermutedBlocks) -> Tensor:
    """The sorted tile that holds key 0, [K, QT, 2] with -1 as the second."""
    place = (order_KN[:, : method.segment] == 0).int().argmax(1).int() // method.tile
    return torch.stack((place, torch.full_like(place, -1)), 1).unsqueeze(1).repeat(1, num_query_tiles, 1)


def permuted_blocks(q_TQD: Tensor, k_NKD: Tensor, start: int, method: PermutedBlocks, scale: float) -> PermutedTiles:
    """Order and lists of a chunk. Before the second segment there is nothing to choose: both are empty."""
    end = start + len(q_TQD)
    num_sorted = (end - 1) // method.segment * method.segment
    num_kv, head_dim = k_NKD.shape[1:]
    counts = segment_counts(start, end, method).to(q_TQD.device)
    if num_sorted == 0:
        nothing = torch.zeros(num_kv, 0, device=q_TQD.device)
        return PermutedTiles(nothing.int(), nothing.bool().unsqueeze(1).expand(-1, len(counts), -1))
    order = segment_order(importance(q_TQD[-method.probe :], k_NKD[:num_sorted], scale), method.segment)
    sorted_keys = k_NKD.transpose(0, 1).gather(1, order.long().unsqueeze(2).expand(-1, -1, head_dim))
    pooled = sorted_keys.view(num_kv, -1, method.tile, head_dim).mean(2, dtype=torch.float32).to(k_NKD.dtype)
    queries = pool_queries(q_TQD, start, method.tile)
    # A pooled tile is a group of one row, and a tile of one group.
    mass = tile_mass(
        queries, pooled.transpose(0, 1), counts, counts, query_tiles(start, end, method.tile).start, 1, 1, scale
    )
    return PermutedTiles(order, keep_tiles(mass, counts, sink_tiles(order, len(counts), method), method.threshold))

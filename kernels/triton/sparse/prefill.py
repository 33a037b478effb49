"""Block-sparse prefill of one chunk: choose key tiles, then attend to lists of them through the paged kernel.

A list of tiles is a page table, one for each (kv head, query tile): the pool is seen as pages of one kv head each, and
the rows stand head by head, so that a query tile is a span of its own. Its last tile is its own; the tiles before are
seen whole, so a row's mask is still one count of keys. How long lists are is read back to plan the attention: one wait
a layer, which prefill can pay and CUDA graphs cannot (chunks are not captured).

Legend as in `kernels/sparse_prefill.py`; M pages of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.sparse_prefill import (
    PermutedBlocks,
    XAttention,
    group_limits,
    pool_queries,
    query_tiles,
    segment_counts,
    sink_tiles,
    x_forced,
)
from kernels.triton.paged import PagedAttention
from kernels.triton.sparse.permute import copy_keys, importance, segment_order
from kernels.triton.sparse.tile_mass import keep_tiles, tile_mass


def x_attention_lists(
    q_TQD: Tensor, k_pages: Tensor, table_M: Tensor, start: int, method: XAttention, scale: float
) -> tuple[Tensor, Tensor]:
    """`sparse_prefill.x_attention` as lists: tiles int32 [K, QT, KT], ascending, and lengths int32 [K, QT]."""
    end, device = start + len(q_TQD), q_TQD.device
    tiles = query_tiles(start, end, method.tile)
    counts = (torch.tensor(tiles).int() + 1).to(device)
    limits = group_limits(start, end, method.stride, method.tile).to(device)
    mass = tile_mass(
        q_TQD, k_pages, table_M, limits, counts, start, method.stride, method.tile // method.stride, scale, tiles.stop
    )
    return keep_tiles(mass, counts, x_forced(k_pages.shape[1], tiles).to(device), method.threshold)


def x_attention(
    attention: PagedAttention,
    q_TQD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table_M: Tensor,
    start: int,
    method: XAttention,
    scale: float,
) -> Tensor:
    """Causal attention of the rows [start, start + T) of one sequence to the tiles that XAttention keeps, [T, Q, D].

    table_M  int32, the sequence's pages; the chunk's keys are written
    Raises ValueError if the pages do not divide a tile, or groups of `stride` keys the pages.
    """
    page = k_pages.shape[2]
    if method.tile % page:
        raise ValueError(f"pages of {page} keys do not divide tiles of {method.tile}")
    tiles, lengths = x_attention_lists(q_TQD, k_pages, table_M, start, method, scale)
    per_tile = method.tile // page
    listed = tiles.masked_fill(torch.arange(tiles.shape[2], device=tiles.device) >= lengths.unsqueeze(2), 0)
    pages = listed.unsqueeze(3) * per_tile + torch.arange(per_tile, device=tiles.device)
    # A query tile's own pages may end before its tile does; what is listed behind them is not read.
    ids = table_M[pages.clamp_max(len(table_M) - 1).long().flatten(2)]
    return _attend(
        attention, q_TQD, k_pages, v_pages, _of_head(ids, k_pages.shape[1]), lengths, start, method.tile, scale
    )


def permuted_blocks(
    attention: PagedAttention,
    q_TQD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table_M: Tensor,
    start: int,
    method: PermutedBlocks,
    scale: float,
) -> Tensor:
    """Causal attention of a chunk as PBS-Attn reads it, [T, Q, D]; arguments as `x_attention`.

    Needs memory for a copy of the layer's keys and values of the sequence.
    """
    num_kv, _, head_dim = k_pages.shape[1:]
    end, tile, device = start + len(q_TQD), method.tile, q_TQD.device
    tiles = query_tiles(start, end, tile)
    num_sorted = (end - 1) // method.segment * method.segment
    plain_start = start // method.segment * method.segment
    num_tiles, plain_tiles = num_sorted // tile, tiles.stop - plain_start // tile
    # One pool for both copies, tiles of one head each: all sorted ones first, then those in the keys' own order.
    pool = [k_pages.new_empty((num_kv * (num_tiles + plain_tiles), 1, tile, head_dim)) for _ in range(2)]
    sorted_kv, plain_kv = (
        [part.view(num_kv, -1, head_dim) for part in parts]
        for parts in zip(*(torch.split(p, [num_kv * num_tiles, num_kv * plain_tiles]) for p in pool), strict=True)
    )
    copy_keys(k_pages, v_pages, table_M, None, plain_start, end - plain_start, plain_kv[0], plain_kv[1])
    counts = segment_counts(start, end, method).to(device)
    kept = torch.zeros((num_kv, len(tiles), 0), dtype=torch.int32, device=device)
    lengths = torch.zeros((num_kv, len(tiles)), dtype=torch.int32, device=device)
    if num_sorted:
        order = segment_order(
            importance(q_TQD[-method.probe :].contiguous(), k_pages, table_M, num_sorted, scale), method.segment
        )
        copy_keys(k_pages, v_pages, table_M, order, 0, num_sorted, sorted_kv[0], sorted_kv[1])
        pooled = sorted_kv[0].view(num_kv, num_tiles, tile, head_dim).mean(2, dtype=torch.float32).to(k_pages.dtype)
        mass = tile_mass(
            pool_queries(q_TQD, start, tile), pooled.unsqueeze(0).contiguous(), counts.new_zeros(1), counts, counts,
            tiles.start, 1, 1, scale, num_tiles,
        )  # fmt: skip
        forced = sink_tiles(order, len(tiles), method)
        kept, lengths = keep_tiles(mass, counts, forced.to(torch.int32), method.threshold)
    own = torch.arange(tiles.start, tiles.stop, device=device)
    ids, lengths = _with_own_segment(kept, lengths, own - plain_start // tile, (own - counts).int(), plain_tiles)
    return _attend(attention, q_TQD, pool[0], pool[1], ids, lengths, start, tile, scale)


def _with_own_segment(
    kept: Tensor, lengths: Tensor, last_own: Tensor, num_before: Tensor, plain_tiles: int
) -> tuple[Tensor, Tensor]:
    """Lists in the pool: kept sorted tiles, then the tiles of the query tile's segment up to its own.

    last_own    [QT] place of the query tile among a head's tiles in their own order
    num_before  [QT] tiles of its segment before it
    """
    num_kv, num_query_tiles, num_tiles = kept.shape
    width = num_tiles + int(num_query_tiles > 0) * plain_tiles
    place = torch.arange(width, device=kept.device)
    head = torch.arange(num_kv, device=kept.device).view(-1, 1, 1)
    length, before = lengths.unsqueeze(2), num_before.view(1, -1, 1)
    own = num_kv * num_tiles + head * plain_tiles + last_own.view(1, -1, 1) - before + (place - length).clamp_min(0)
    whole = torch.nn.functional.pad(kept, (0, plain_tiles)) + head * num_tiles
    ids = torch.where(place < length, whole, own)
    return ids.int(), lengths + num_before + 1


def _of_head(ids_KQP: Tensor, num_kv: int) -> Tensor:
    """Pages of all heads as pages of one."""
    return ids_KQP * num_kv + torch.arange(num_kv, device=ids_KQP.device, dtype=torch.int32).view(-1, 1, 1)


def _attend(
    attention: PagedAttention,
    q_TQD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    ids_KQP: Tensor,
    lengths_KQ: Tensor,
    start: int,
    tile: int,
    scale: float,
) -> Tensor:
    """Rows of each query tile to the listed pages of their kv head, `tile` keys of it in the list's last tile."""
    num_rows, num_q, head_dim = q_TQD.shape
    num_kv, num_query_tiles, num_pages = ids_KQP.shape
    device = q_TQD.device
    at = torch.arange(start, start + num_rows, device=device)
    of_row = at // tile - start // tile
    visible = ((lengths_KQ[:, of_row] - 1) * tile + at % tile + 1).int().flatten()
    tiles = query_tiles(start, start + num_rows, tile)
    bounds = torch.tensor([max(start, index * tile) - start for index in tiles], dtype=torch.int32)
    starts = torch.cat([bounds + head * num_rows for head in range(num_kv)] + [torch.tensor([num_kv * num_rows]).int()])
    heads = torch.arange(num_kv, device=device).unsqueeze(1)
    rows = AttentionRows(
        ids_KQP.reshape(-1, num_pages), (heads * num_query_tiles + of_row).int().flatten(), visible - 1, visible,
        visible.new_zeros(len(visible), dtype=torch.int64), starts.to(device),
    )  # fmt: skip
    head_major = q_TQD.view(num_rows, num_kv, -1, head_dim).transpose(0, 1).reshape(num_kv * num_rows, -1, head_dim)
    page = k_pool.shape[2]
    k_one, v_one = (pool.view(-1, 1, page, head_dim) for pool in (k_pool, v_pool))
    out = attention.run(head_major, k_one, v_one, rows, scale, None)
    return out.view(num_kv, num_rows, -1, head_dim).transpose(0, 1).reshape(num_rows, num_q, head_dim)

"""Attention of rows to lists of key tiles, through any back end's paged attention.

A list of tiles is a page table, one for each (kv head, query tile): the pool is seen as pages of one kv head each, and
the rows stand head by head, so that a query tile is a span of its own. Its last tile is its own; the tiles before are
seen whole, so a row's mask is still one count of keys.

Legend as in `sparse_prefill.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.sparse_prefill import query_tiles

Attend = Callable[[Tensor, Tensor, Tensor, AttentionRows], Tensor]
"""(q [T, G, D], k_pages and v_pages of one kv head, rows) -> [T, G, D], causal and with the scale of the layer."""


def lists_of(keep_KQT: Tensor) -> tuple[Tensor, Tensor]:
    """Kept tiles as ids int32 [K, QT, KT], ascending, anything behind them, and lengths int32 [K, QT]."""
    order = (~keep_KQT).int().sort(dim=2, stable=True).indices
    return order.int(), keep_KQT.sum(2).int()


def page_lists(tiles_KQT: Tensor, lengths_KQ: Tensor, table_M: Tensor, per_tile: int) -> Tensor:
    """Pages of one kv head, int32 [K, QT, KT * per_tile], of listed tiles of a sequence."""
    num_kv, _, num_tiles = tiles_KQT.shape
    place = torch.arange(num_tiles, device=tiles_KQT.device)
    listed = tiles_KQT.masked_fill(place >= lengths_KQ.unsqueeze(2), 0)
    pages = listed.unsqueeze(3) * per_tile + torch.arange(per_tile, device=tiles_KQT.device)
    # A query tile's own pages may end before its tile does; what is listed behind them is not read.
    ids = table_M[pages.clamp_max(len(table_M) - 1).long().flatten(2)]
    return ids * num_kv + torch.arange(num_kv, device=ids.device, dtype=torch.int32).view(-1, 1, 1)


def with_own_segment(
    kept: Tensor, lengths: Tensor, last_own: Tensor, num_before: Tensor, plain_tiles: int
) -> tuple[Tensor, Tensor]:
    """Lists in a pool of copies (PBS-Attn): kept sorted tiles, then those of the query tile's segment up to its own.

    The pool has the sorted tiles of all heads, head by head, then `plain_tiles` of each head in the keys' own order.
    last_own    [QT] place of the query tile among a head's tiles in their own order
    num_before  [QT] tiles of its segment before it
    """
    num_kv, _, num_tiles = kept.shape
    place = torch.arange(num_tiles + plain_tiles, device=kept.device)
    head = torch.arange(num_kv, device=kept.device).view(-1, 1, 1)
    length, before = lengths.unsqueeze(2), num_before.view(1, -1, 1)
    own = num_kv * num_tiles + head * plain_tiles + last_own.view(1, -1, 1) - before + (place - length).clamp_min(0)
    # Behind a list's end stands a tile that there is.
    own = own.clamp_max(num_kv * (num_tiles + plain_tiles) - 1)
    whole = torch.nn.functional.pad(kept, (0, plain_tiles)) + head * num_tiles
    return torch.where(place < length, whole, own).int(), lengths + num_before + 1


def attend_lists(
    attend: Attend, q_TQD: Tensor, k_pool: Tensor, v_pool: Tensor, ids_KQP: Tensor, lengths_KQ: Tensor, start: int,
    tile: int,
) -> Tensor:  # fmt: skip
    """Rows of each query tile to the listed pages of their kv head, up to the row itself in the list's last tile.

    k_pool, v_pool  [P, K', S, D]; ids are of the pages of one head that they hold: page * K' + head
    """
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
    k_one, v_one = (pool.flatten(0, 1).unsqueeze(1) for pool in (k_pool, v_pool))
    out = attend(head_major, k_one, v_one, rows)
    return out.view(num_kv, num_rows, -1, head_dim).transpose(0, 1).reshape(num_rows, num_q, head_dim)

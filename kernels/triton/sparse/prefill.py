"""Block-sparse prefill of one part: choose key tiles, then attend to lists of them through the paged kernel.

Lists as page tables: `kernels/tile_lists.py`. How long lists are is read back to plan the attention: one wait a layer,
which prefill can pay and CUDA graphs cannot (steps with such parts are not captured).

Legend as in `kernels/sparse_prefill.py`; M pages of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.prefill_rows import PrefillPart
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
from kernels.tile_lists import Attend, attend_lists, page_lists, with_own_segment
from kernels.triton.paged import PagedAttention
from kernels.triton.sparse.permute import copy_keys, importance, segment_order
from kernels.triton.sparse.tile_mass import keep_tiles, tile_mass


def attend_part(
    attention: PagedAttention, q_TQD: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, part: PrefillPart,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention of a part's rows, [T, Q, D]. attention: one whose rows nobody else plans, without shared prefixes."""
    table_M = page_table[part.sequence, : -(-part.end // k_pages.shape[2])].contiguous()
    if isinstance(part.method, XAttention):
        return x_attention(attention, q_TQD, k_pages, v_pages, table_M, part.start, part.method, scale)
    return permuted_blocks(attention, q_TQD, k_pages, v_pages, table_M, part.start, part.method, scale)


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
    ids = page_lists(tiles, lengths, table_M, method.tile // page)
    return attend_lists(_run(attention, scale), q_TQD, k_pages, v_pages, ids, lengths, start, method.tile)


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
    ids, lengths = with_own_segment(kept, lengths, own - plain_start // tile, (own - counts).int(), plain_tiles)
    return attend_lists(_run(attention, scale), q_TQD, pool[0], pool[1], ids, lengths, start, tile)


def _run(attention: PagedAttention, scale: float) -> Attend:
    return lambda q, k_pages, v_pages, rows: attention.run(q, k_pages, v_pages, rows, scale, None)

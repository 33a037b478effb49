"""A part of a block-sparse prompt by the plain-torch selections and the back end's own attention to lists of tiles.

What runs where no kernel chooses: the reference, and the CPU, where choosing costs 1 / stride of the scores that it
saves. Each query tile, or each region of PBS-Attn, is chosen for by itself and over the keys before its own end: so the
products have shapes that its position gives, and its lists do not hang on how many tiles a step has.

Legend as in `sparse_prefill.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.prefill_rows import PrefillPart
from kernels.sparse_prefill import (
    PermutedBlocks,
    XAttention,
    group_limits,
    keep_tiles,
    key_groups,
    mass_of_scores,
    permuted_blocks,
    query_tiles,
    reversed_groups,
    segment_counts,
    x_forced,
)
from kernels.tile_lists import Attend, attend_lists, lists_of, page_lists, with_own_segment

Products = Callable[[Tensor, int], Tensor]
"""(q [K, R, C], how many keys) -> float32 [K, R, count]."""


class Layout(Protocol):
    """How a back end's pages are read and made."""

    def read_keys(self, k_pages: Tensor, table_M: Tensor) -> Tensor:
        """All slots of these pages, [M * S, K, D]; unwritten ones hold anything."""
        ...

    def read_values(self, v_pages: Tensor, table_M: Tensor) -> Tensor: ...

    def products(self, k_KJC: Tensor) -> Products:
        """With these keys. A row's bits hang on its q, the keys and how many of them are asked for, on nothing else."""
        ...

    def make_pages(self, k_PSD: Tensor, v_PSD: Tensor) -> tuple[Tensor, Tensor]:
        """Pages of one kv head that hold these keys and values, [P, 1, S, D]."""
        ...


class PlainLayout:
    """Pages [P, K, S, D] as they are."""

    def read_keys(self, k_pages: Tensor, table_M: Tensor) -> Tensor:
        return k_pages[table_M.long()].transpose(1, 2).flatten(0, 1)

    read_values = read_keys

    def products(self, k_KJC: Tensor) -> Products:
        k_KJC = k_KJC.float()
        return lambda q_KRC, count: torch.matmul(q_KRC.float(), k_KJC[:, :count].transpose(1, 2))

    def make_pages(self, k_PSD: Tensor, v_PSD: Tensor) -> tuple[Tensor, Tensor]:
        return k_PSD.unsqueeze(1), v_PSD.unsqueeze(1)


def attend_part(
    layout: Layout, attend: Attend, q_TQD: Tensor, k_pages: Tensor, v_pages: Tensor, table_M: Tensor, part: PrefillPart,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention of a part's rows, [T, Q, D]. table_M: the sequence's pages.

    Raises ValueError if the pages do not divide a tile.
    """
    page = k_pages.shape[2]
    if part.method.tile % page:
        raise ValueError(f"pages of {page} keys do not divide tiles of {part.method.tile}")
    table_M = table_M[: -(-part.end // page)]
    keys = layout.read_keys(k_pages, table_M)[: part.end]
    if isinstance(part.method, XAttention):
        keep = _x_keep(layout, q_TQD, keys, part.start, part.method, scale)
        tiles, lengths = lists_of(keep)
        ids = page_lists(tiles, lengths, table_M, part.method.tile // page)
        return attend_lists(attend, q_TQD, k_pages, v_pages, ids, lengths, part.start, part.method.tile)
    values = layout.read_values(v_pages, table_M)[: part.end]
    return _permuted(layout, attend, q_TQD, keys, values, part.start, part.method, scale)


def _x_keep(layout: Layout, q_TQD: Tensor, k_NKD: Tensor, start: int, method: XAttention, scale: float) -> Tensor:
    """`sparse_prefill.x_attention`, tile by tile, bool [K, QT, KT]."""
    end, tile, stride, num_kv = start + len(q_TQD), method.tile, method.stride, k_NKD.shape[1]
    tiles, group_tile = query_tiles(start, end, tile), tile // stride
    products = layout.products(key_groups(k_NKD, end // stride, stride))
    kept = []
    for index in tiles:
        first, last = max(start, index * tile), min(end, (index + 1) * tile)
        limits, counts = (part.to(q_TQD.device) for part in (group_limits(first, last, stride, tile), _count(index)))
        scores, num_key_groups = None, int(limits.max())
        if num_key_groups:
            q_KRC = reversed_groups(q_TQD[first - start : last - start], num_kv, limits, first, stride, group_tile)
            scores = products(q_KRC, num_key_groups)
        mass = mass_of_scores(scores, num_kv, limits, counts, group_tile, scale / stride)
        forced = x_forced(num_kv, range(index, index + 1)).to(q_TQD.device)
        keep = keep_tiles(mass, counts, forced, method.threshold)
        kept.append(pad(keep, (0, tiles.stop - keep.shape[2])))
    return torch.cat(kept, dim=1)


def _count(index: int) -> Tensor:
    """Tiles up to one, int32 [1]."""
    return torch.tensor([index + 1], dtype=torch.int32)


def _permuted(
    layout: Layout, attend: Attend, q_TQD: Tensor, k_NKD: Tensor, v_NKD: Tensor, start: int, method: PermutedBlocks,
    scale: float,
) -> Tensor:  # fmt: skip
    """Needs memory for a copy of the layer's keys and values of the sequence."""
    head_dim = k_NKD.shape[2]
    end, tile, device = start + len(q_TQD), method.tile, q_TQD.device
    tiles = query_tiles(start, end, tile)
    chosen = permuted_blocks(q_TQD, k_NKD, start, method, scale)
    plain_start = start // method.segment * method.segment
    plain_tiles = tiles.stop - plain_start // tile
    index = chosen.order_KN.long().unsqueeze(2).expand(-1, -1, head_dim)

    def copies(kv_NKD: Tensor) -> Tensor:
        by_head = kv_NKD.transpose(0, 1)
        plain = pad(by_head[:, plain_start:], (0, 0, 0, plain_start + plain_tiles * tile - end))
        return torch.cat([part.reshape(-1, tile, head_dim) for part in (by_head.gather(1, index), plain)])

    k_pool, v_pool = layout.make_pages(copies(k_NKD), copies(v_NKD))
    kept, lengths = lists_of(chosen.keep)
    own, before = torch.arange(tiles.start, tiles.stop, device=device), segment_counts(start, end, method).to(device)
    ids, lengths = with_own_segment(kept, lengths, own - plain_start // tile, (own - before).int(), plain_tiles)
    return attend_lists(attend, q_TQD, k_pool, v_pool, ids, lengths, start, tile)

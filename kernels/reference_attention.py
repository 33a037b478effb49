"""Paged attention in plain torch, float32 inside: the part of `reference.py` that follows rows through page tables.

Keys are gathered tile by tile of rows; no Python loop over tokens or heads. Legend of shapes in ops.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.blocks import AttentionForm
from kernels.kv_format import check_scale, head_dim_of, read_pages
from kernels.ops import AttentionRows

TILE_ROWS = 256
"""Longer spans are attended in tiles of this many rows, which bounds the score matrix."""
MAX_SCORES = 1 << 24
"""Most attention scores (rows x query heads x keys) held at once."""


def attend(
    q_TQD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
    scale: float,
    window: int | None,
    form: AttentionForm,
    kv_scale_2K: Tensor | None,
) -> Tensor:
    """`Ops.paged_attention`."""
    check_scale(k_pages, kv_scale_2K)
    out_TQD = torch.empty_like(q_TQD)
    for tiles in _equal_tiles(rows.span_starts, q_TQD.shape[1], k_pages.shape[2] * rows.page_table.shape[1]):
        out_TQD[tiles] = _attend(q_TQD, k_pages, v_pages, rows, tiles, scale, window, form, kv_scale_2K)
    return out_TQD


def _equal_tiles(span_starts: Tensor, num_heads: int, max_keys: int) -> list[Tensor]:
    """Cut the step's rows into tiles within spans; returns groups of equally long tiles, int64 [tiles, rows]."""
    bounds = span_starts.tolist()
    by_length: dict[int, list[int]] = {}
    for start, end in pairwise(bounds):
        for tile in range(start, end, TILE_ROWS):
            by_length.setdefault(min(TILE_ROWS, end - tile), []).append(tile)
    groups = []
    for length, starts in by_length.items():
        most = max(1, MAX_SCORES // (length * num_heads * max(1, max_keys)))
        rows = torch.tensor(starts, device=span_starts.device).unsqueeze(1)
        rows = rows + torch.arange(length, device=span_starts.device)
        groups += list(torch.split(rows, most))
    return groups


def _attend(
    q_TQD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
    tiles: Tensor,
    scale: float,
    window: int | None,
    form: AttentionForm,
    kv_scale_2K: Tensor | None,
) -> Tensor:
    """Attention of B tiles of R rows, [B, R, Q, D]; keys are gathered per tile and padded to the longest."""
    num_kv, page_size, head_dim = *k_pages.shape[1:3], head_dim_of(k_pages)
    num_tiles, num_rows = tiles.shape
    visible = rows.visible[tiles]  # [B, R]
    if rows.tree is not None:
        visible = visible.where(rows.tree[tiles] == 0, _tree_ends(rows, tiles))
    num_keys = int(visible.max())
    if num_keys == 0:
        return q_TQD.new_zeros((num_tiles, num_rows, *q_TQD.shape[1:]))
    num_pages = -(-num_keys // page_size)
    index = torch.arange(num_pages * page_size, device=q_TQD.device)
    seen = index < visible.unsqueeze(2)  # [B, R, L]
    if window is not None:
        seen &= (index > (rows.positions[tiles] - window).unsqueeze(2)) | (index < form.sinks)
    if rows.tree is not None:
        seen = _seen_in_trees(rows, tiles, index, window, seen)
    read = seen.any(dim=1)  # [B, L]: the keys this tile reads at all
    table = rows.page_table[rows.row_seq[tiles[:, 0]].long(), :num_pages].long()
    table = table.where(read.view(num_tiles, num_pages, page_size).any(2), 0)

    def gather(pages: Tensor, scale_K: Tensor | None) -> Tensor:
        keys = read_pages(pages[table], scale_K).transpose(1, 2).reshape(num_tiles, num_kv, 1, -1, head_dim)
        # A weight of zero times NaN is NaN: what is not read must not be there.
        return keys.masked_fill(~read.view(num_tiles, 1, 1, -1, 1), 0.0)

    q = q_TQD[tiles].float().view(num_tiles, num_rows, num_kv, -1, head_dim).permute(0, 2, 3, 1, 4)  # [B, K, G, R, D]
    k_scale_K, v_scale_K = (None, None) if kv_scale_2K is None else kv_scale_2K
    scores = torch.matmul(q, gather(k_pages, k_scale_K).transpose(-1, -2)) * scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.masked_fill(~seen.view(num_tiles, 1, 1, num_rows, -1), float("-inf"))
    out = torch.matmul(_softmax(scores, form.sink_logits_Q), gather(v_pages, v_scale_K))
    return out.permute(0, 3, 1, 2, 4).reshape(num_tiles, num_rows, -1, head_dim).to(q_TQD.dtype)


def _softmax(scores: Tensor, sink_logits_Q: Tensor | None) -> Tensor:
    """Over the keys of [B, K, G, R, L], and over each head's sink, whose weight is then left out."""
    if sink_logits_Q is None:
        return torch.softmax(scores, dim=-1)
    sinks = sink_logits_Q.float().view(1, scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]


def _tree_bits(rows: AttentionRows, tiles: Tensor) -> Tensor:
    """The rows' tree masks bit by bit, bool [B, R, 64]."""
    assert rows.tree is not None
    return (rows.tree[tiles].unsqueeze(2) >> torch.arange(64, device=tiles.device)) & 1 != 0


def _tree_ends(rows: AttentionRows, tiles: Tensor) -> Tensor:
    """One more than the last key that each row's mask names, int32 [B, R]; no meaning where the mask is 0."""
    assert rows.tree_starts is not None
    bits = _tree_bits(rows, tiles) * torch.arange(1, 65, dtype=torch.int32, device=tiles.device)
    return rows.tree_starts[tiles] + bits.amax(dim=2)


def _seen_in_trees(rows: AttentionRows, tiles: Tensor, index: Tensor, window: int | None, seen: Tensor) -> Tensor:
    """`seen` [B, R, L], with the rows of draft trees following their masks from the tree's first key on."""
    assert rows.tree is not None
    assert rows.tree_starts is not None
    bits = _tree_bits(rows, tiles)
    if window is not None:
        bits &= bits.flip(2).cumsum(2).flip(2) <= window
    offset = index - rows.tree_starts[tiles].unsqueeze(2)
    inside = bits.gather(2, offset.clamp(0, 63)) & (offset < 64)
    is_tree = (rows.tree[tiles] != 0).unsqueeze(2)
    return seen.where(~is_tree | (offset < 0), inside)

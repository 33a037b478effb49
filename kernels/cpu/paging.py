"""The CPU kernels' pages read back into rows, and made of rows, by torch: what layer.h's KvLayout says, both ways.

Legend of shapes in kernels/ops.py; M pages.
"""

from __future__ import annotations

from ctypes import CDLL, c_void_p

import torch
from torch import Tensor

from kernels.cpu.products import KeyProducts


def page_memory(
    num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Whole k and v pages, padded to whole tiles, not initialised; `trim` gives them their shape."""
    per_word = 4 // dtype.itemsize
    tile, panel = key_tile(page_size), dim_panel(head_dim)
    keys = -(-page_size // tile) * tile
    k_dims, v_dims = -(-head_dim // per_word) * per_word, -(-head_dim // panel) * panel
    return (
        torch.empty((num_pages, num_kv, keys, k_dims), dtype=dtype),
        torch.empty((num_pages, num_kv, keys, v_dims), dtype=dtype),
    )


def trim(pages: Tensor, page_size: int, head_dim: int) -> Tensor:
    return pages[:, :, :page_size, :head_dim]


def key_tile(page_size: int) -> int:
    return 16 if page_size <= 16 else 32


def dim_panel(head_dim: int) -> int:
    return 16 if head_dim <= 16 else 32


class CpuLayout:
    """`kernels.prefill_torch.Layout` of trimmed pages."""

    def __init__(self, lib: CDLL, pool: c_void_p) -> None:
        self._lib, self._pool = lib, pool

    def products(self, k_KJC: Tensor) -> KeyProducts:
        return KeyProducts(self._lib, self._pool, k_KJC)

    def read_keys(self, k_pages: Tensor, table_M: Tensor) -> Tensor:
        return _rows(_key_words(_whole(k_pages)[table_M.long()], k_pages.shape[2]), k_pages)

    def read_values(self, v_pages: Tensor, table_M: Tensor) -> Tensor:
        return _rows(_value_words(_whole(v_pages)[table_M.long()], v_pages.shape[3]), v_pages)

    def make_pages(self, k_PSD: Tensor, v_PSD: Tensor) -> tuple[Tensor, Tensor]:
        num_pages, page_size, head_dim = k_PSD.shape
        k_pages, v_pages = page_memory(num_pages, page_size, 1, head_dim, k_PSD.dtype)
        for pages, words, rows in (
            (k_pages, _key_words(k_pages, page_size), k_PSD),
            (v_pages, _value_words(v_pages, head_dim), v_PSD),
        ):
            keys, dims = pages.shape[2:]
            padded = torch.nn.functional.pad(rows, (0, dims - head_dim, 0, keys - page_size))
            words.copy_(padded.view(words.shape))
        return trim(k_pages, page_size, head_dim), trim(v_pages, page_size, head_dim)


def _whole(pages: Tensor) -> Tensor:
    """Trimmed pages with their padding."""
    num_pages, num_kv = pages.shape[:2]
    dims = pages.stride(2)
    return pages.as_strided((num_pages, num_kv, pages.stride(1) // dims, dims), pages.stride())


def _key_words(k_pages: Tensor, page_size: int) -> Tensor:
    """A view of whole pages, [P, K, tiles, keys of a tile, words, elements of a word]."""
    num_pages, num_kv, keys, dims = k_pages.shape
    tile, per_word = key_tile(page_size), 4 // k_pages.element_size()
    shape = (num_pages, num_kv, keys // tile, dims // per_word, tile, per_word)
    return k_pages.view(shape).permute(0, 1, 2, 4, 3, 5)


def _value_words(v_pages: Tensor, head_dim: int) -> Tensor:
    """A view of whole pages, [P, K, words of keys, keys of a word, panels, dims of a panel]."""
    num_pages, num_kv, keys, dims = v_pages.shape
    panel, per_word = dim_panel(head_dim), 4 // v_pages.element_size()
    shape = (num_pages, num_kv, dims // panel, keys // per_word, panel, per_word)
    return v_pages.view(shape).permute(0, 1, 3, 5, 2, 4)


def _rows(words: Tensor, pages: Tensor) -> Tensor:
    """[M * S, K, D] of whole pages' words, without the padding."""
    num_pages, num_kv = words.shape[:2]
    page_size, head_dim = pages.shape[2:]
    whole = words.reshape(num_pages, num_kv, pages.stride(1) // pages.stride(2), pages.stride(2))
    return trim(whole, page_size, head_dim).transpose(1, 2).flatten(0, 1)

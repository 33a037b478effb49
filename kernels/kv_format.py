"""What a KV page holds when its dtype is not the model's: fp8 and int8 codes, where their scales lie, and both codecs.

A page of one kv head is one record. In a float dtype it is [S, D]; in int8 it is [S, D] codes, then S float32 scales,
so that whoever copies or shares a page takes the scales along. The tensor is [P, K, S, D + 4] bytes then, and nobody
but this file and the kernels may read its last two dimensions as such.

Legend of shapes in kernels/ops.py. Lossy: int8 keeps amax / 254 of a (token, head)'s greatest element, fp8 e4m3 four
bits of each. Format: `attention.md` 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
"""A float32 scale for each (token, kv head) of int8 pages: 3 % of 128 codes."""
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
_POISON_BYTE = -1
"""Four of them are a NaN as a scale."""


def stored_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What pages of a model of `dtype` can be: its own, int8, fp8, and for float32 the narrower floats."""
    narrower = (torch.bfloat16, torch.float16) if dtype == torch.float32 else ()
    return (dtype, *narrower, FP8, torch.int8)


def check_scale(pages: Tensor, scale_2K: Tensor | None) -> None:
    """Raises ValueError for scales that these pages do not take, or not of this shape."""
    if scale_2K is None:
        return
    if pages.dtype != FP8 or scale_2K.shape != (2, pages.shape[1]) or scale_2K.dtype != torch.float32:
        raise ValueError(
            f"kv_scale is {scale_2K.dtype} {list(scale_2K.shape)} for pages of {pages.dtype}; it must be float32 "
            f"[2, {pages.shape[1]}], and only fp8 pages take one"
        )


def scale_pointers(k_pages: Tensor, v_pages: Tensor, scale_2K: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales of keys and values as kernels take them: pages read as float32, or [K]; anything where they read none."""
    if k_pages.dtype == torch.int8:
        return k_pages.view(torch.float32), v_pages.view(torch.float32)
    return (k_pages, v_pages) if scale_2K is None else (scale_2K[0], scale_2K[1])


def slot_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of K (or of V) of one token and kv head, its scale included."""
    return head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)


def page_shape(num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Of `allocate_kv`'s tensors. Raises ValueError for int8 heads whose scales would not be aligned."""
    if dtype == torch.int8 and head_dim % SCALE_BYTES:
        raise ValueError(f"int8 KV needs heads of a multiple of {SCALE_BYTES} elements; this model's have {head_dim}")
    return num_pages, num_kv, page_size, slot_bytes(head_dim, dtype) // dtype.itemsize


def head_dim_of(pages: Tensor) -> int:
    return int(pages.shape[-1]) - (SCALE_BYTES if pages.dtype == torch.int8 else 0)


def split_record(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Views of int8 pages [..., S, D + 4]: codes [..., S, D] and scales, float32 [..., S]."""
    page_size, head_dim = pages.shape[-2], head_dim_of(pages)
    records = pages.flatten(-2)
    codes, scales = records[..., : page_size * head_dim], records[..., page_size * head_dim :]
    return codes.view(*pages.shape[:-1], head_dim), scales.view(torch.float32)


def write_slots(pages: Tensor, slots_T: Tensor, x_TKD: Tensor, scale_K: Tensor | None) -> None:
    """Store rows at their slots in the pages' dtype; scale_K as in `Ops.qkv_rope_write`, for fp8 pages."""
    page_size = pages.shape[2]
    page, offset = slots_T // page_size, slots_T % page_size
    if pages.dtype == torch.int8:
        codes, scales = split_record(pages)
        codes[page, :, offset], scales[page, :, offset] = encode_int8(x_TKD)
    elif pages.dtype == FP8:
        pages[page, :, offset] = encode_fp8(x_TKD, scale_K)
    else:
        pages[page, :, offset] = x_TKD.to(pages.dtype)


def read_pages(pages: Tensor, scale_K: Tensor | None) -> Tensor:
    """float32 [..., K, S, D] of whole pages."""
    if pages.dtype == torch.int8:
        codes, scales = split_record(pages)
        return codes.float() * scales.unsqueeze(-1)
    values = pages.float()
    return values if scale_K is None else values * scale_K.view(-1, 1, 1)


def encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of [..., D]: scale = amax / 127, code = round(x / scale); rows of zeros have scale 0."""
    x = x.float()
    scale = x.abs().amax(-1) / INT8_MAX
    codes = (x / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).round().clamp(-INT8_MAX, INT8_MAX)
    # A NaN has no code; its row's scale is NaN, which is what a reader sees.
    return codes.nan_to_num().to(torch.int8), scale


def encode_fp8(x_TKD: Tensor, scale_K: Tensor | None) -> Tensor:
    """e4m3 codes of x / scale, nearest even; what is beyond 448 becomes 448."""
    x = x_TKD.float()
    if scale_K is not None:
        x = x / scale_K.unsqueeze(-1)
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def fill_with_nan(pages: Tensor) -> None:
    """Make every key and value NaN: the elements, or the scales over int8 codes."""
    if pages.dtype == torch.int8:
        pages.fill_(_POISON_BYTE)
    else:
        pages.fill_(float("nan"))

"""What sparse rows need to know of keys, kept under the ids of their pages: bounds of pages, labels of keys.

Both are written after the keys of the same rows, in one launch a layer. Nothing here reads a key that is not written:
a label is of the row's own key, and a sub-page's bounds are made when its last slot is written, from all its keys, so
rewritten slots (rejected drafts, denoised blocks) need no memory of what the bounds were.

Legend of shapes in `kernels/ops.py`; C label channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sparse import SparseLayer, sub_page
from kernels.triton.paged import is_interpreted
from kernels.triton.sparse.label_codes import write_codes
from kernels.triton.tiles import next_power_of_two, padded_dim


@triton.jit
def metadata(
    k_pages,  # [pages, K, PAGE, D]
    slots,  # int64 [T]
    bounds,  # [pages, K, PAGE / SUB, 2, D]: smallest, largest; not written without BOUNDS
    labels,  # [pages, K, PAGE, C]; these two are not used without LABELS
    channels,  # int32 [K, C]
    label_scales,  # bfloat16 [pages, K, PAGE]; not used without CODES
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    SUB: tl.constexpr,
    SUB_P: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BOUNDS: tl.constexpr,
    LABELS: tl.constexpr,
    CODES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (T, K)."""
    slot = tl.load(slots + tl.program_id(0))
    head = tl.program_id(1)
    page = (slot // PAGE) * K + head  # 64 bits from here on
    offset = slot % PAGE
    if CODES:
        write_codes(
            k_pages + (page * PAGE + offset) * D, channels + head * C, labels, label_scales, page * PAGE + offset, C, CP
        )
    elif LABELS:
        c = tl.arange(0, CP)
        channel = tl.load(channels + head * C + c, mask=c < C, other=0)
        label = tl.load(k_pages + (page * PAGE + offset) * D + channel, mask=c < C, other=0.0)
        tl.store(labels + (page * PAGE + offset) * C + c, label, mask=c < C)
    if BOUNDS:  # noqa: SIM102 -- this one is the compiler's, the next the program's
        if offset % SUB == SUB - 1:
            n = tl.arange(0, SUB_P)[:, None]
            d = tl.arange(0, DP)
            at = k_pages + (page * PAGE + offset - (SUB - 1) + n) * D + d[None, :]
            keys = tl.load(at, mask=(n < SUB) & (d < D)[None, :], other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
            least = tl.min(tl.where(n < SUB, keys, float("inf")), 0)
            most = tl.max(tl.where(n < SUB, keys, float("-inf")), 0)
            at = bounds + (page * (PAGE // SUB) + offset // SUB) * 2 * D + d
            tl.store(at, least.to(bounds.dtype.element_ty), mask=d < D)
            tl.store(at + D, most.to(bounds.dtype.element_ty), mask=d < D)


def write_metadata(k_pages: Tensor, slots_T: Tensor, layer: SparseLayer) -> None:
    """After the keys of `slots_T` were written: their labels [P, K, S, C] (or codes and scales), and bounds
    [P, K, N, 2, D] of the sub-pages they complete, as `sparse_reference.allocate` lays them out.

    slots_T  int64; a sequence's slots of one page are written in ascending order, in this step or in others
    """
    bounds, labels, channels_KC = layer.bounds, layer.labels, layer.channels
    if (labels is None) != (channels_KC is None):
        raise ValueError("labels and channels come together")
    num_kv, page_size, head_dim = k_pages.shape[1:]
    num_channels = 1 if channels_KC is None else channels_KC.shape[1]
    scales = layer.label_scales
    if len(slots_T) == 0 or (bounds is None and labels is None):
        return
    metadata[(len(slots_T), num_kv)](
        k_pages, slots_T, k_pages if bounds is None else bounds, k_pages if labels is None else labels,
        slots_T if channels_KC is None else channels_KC, k_pages if scales is None else scales,
        K=num_kv, D=head_dim, DP=padded_dim(head_dim), PAGE=page_size, SUB=sub_page(page_size),
        SUB_P=next_power_of_two(sub_page(page_size)), C=num_channels, CP=next_power_of_two(num_channels),
        BOUNDS=bounds is not None, LABELS=labels is not None, CODES=scales is not None,
        UPCAST=is_interpreted() and k_pages.dtype == torch.bfloat16, num_warps=4,
    )  # fmt: skip

"""Copy single keys and values between two pools of one shape, one of which may be pinned memory of the host.

A program reads host memory over the bus itself, as it reads its own: so which keys are copied may stand in device
memory alone, nothing waits for the host, and rows of D elements (256 bytes of 128 in bfloat16) are whole packets.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.hosted import Pages
from kernels.triton.tiles import padded_dim

_PLACES = 16
"""Keys of a program."""


@triton.jit(do_not_specialize=["num_places"])
def copy_places(
    k_from,  # [pages, K, PAGE, D], as the others
    v_from,
    k_to,
    v_to,
    places,  # int32 or int64 [num_places]
    num_places,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (blocks of BN places)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    mask = (n < num_places)[:, None] & (d < D)[None, :]
    at = tl.load(places + n, mask=n < num_places, other=0).to(tl.int64)[:, None] * D + d[None, :]
    key = tl.load(k_from + at, mask=mask, other=0)
    value = tl.load(v_from + at, mask=mask, other=0)
    tl.store(k_to + at, key, mask=mask)
    tl.store(v_to + at, value, mask=mask)


def copy_keys(source: Pages, target: Pages, places_M: Tensor) -> None:
    """`hosted.Fetches.copy_keys`."""
    for pages, others in zip(source, target, strict=True):
        if pages.shape != others.shape or pages.dtype != others.dtype:
            raise ValueError(f"keys of {pages.dtype} {list(pages.shape)} have no place in {list(others.shape)}")
        if not (pages.is_contiguous() and others.is_contiguous()):
            raise ValueError("pages must be contiguous, as allocate_kv makes them")
    if len(places_M):
        head_dim = source[0].shape[3]
        copy_places[(triton.cdiv(len(places_M), _PLACES),)](
            *source, *target, places_M.contiguous(), len(places_M), D=head_dim, DP=padded_dim(head_dim), BN=_PLACES,
            num_warps=4,
        )  # fmt: skip

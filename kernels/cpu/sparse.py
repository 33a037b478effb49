"""Sparse attention's memory, argument structs and checks for the compiled kernels (layer.h SparseLayer, SparseRows).

Legend of shapes in kernels/ops.py and kernels/sparse.py.
"""

from __future__ import annotations

from ctypes import Array, c_int32

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.cpu.memory import fresh
from kernels.label_codes import num_bytes
from kernels.ops import AttentionRows
from kernels.sparse import Method, Roles, SparseLayer, SparseRows, least_budget, sub_page


def allocate(
    k_pages: Tensor,
    roles: Roles,
    has_bounds: bool,
    channels_KC: Tensor | None,
    int4_labels: bool = False,
) -> SparseLayer:
    """bounds [P, K, N, 2 D padded to whole vectors], labels of [P, K, padded S] keys as in K pages,
    words of 32 bits of all keys of a tile side by side. As codes of 4 bits: the same, and scales [P, K, padded S]."""
    num_pages, num_kv, page_size, head_dim = k_pages.shape
    labels = scales = None
    if channels_KC is not None:
        if channels_KC.dtype != torch.int32 or channels_KC.ndim != 2 or channels_KC.shape[0] != num_kv:
            raise ValueError(f"channels are {channels_KC.dtype} {list(channels_KC.shape)}, not int32 [{num_kv}, C]")
        if not 0 <= int(channels_KC.min()) <= int(channels_KC.max()) < head_dim:
            raise ValueError(f"a label channel lies outside the {head_dim} elements of a key")
        tile = 16 if page_size <= 16 else 32
        num_channels, padded = channels_KC.shape[1], -(-page_size // tile) * tile
        if int4_labels:
            labels = fresh((num_pages, num_kv, padded, -(-num_bytes(num_channels) // 4) * 4), torch.uint8)
            scales = fresh((num_pages, num_kv, padded), torch.bfloat16)
        else:
            per_word = 4 // k_pages.element_size()
            labels = fresh((num_pages, num_kv, padded, -(-num_channels // per_word) * per_word), k_pages.dtype)
        channels_KC = channels_KC.contiguous()
    vector = 64 // k_pages.element_size()
    shape = (num_pages, num_kv, page_size // sub_page(page_size), -(-2 * head_dim // vector) * vector)
    bounds = fresh(shape, k_pages.dtype) if has_bounds else None
    return SparseLayer(roles, bounds, labels, channels_KC, scales)


def layer_struct(layer: SparseLayer | None) -> Array[library.SparseLayer] | None:
    """As a pointer to one struct, null for None."""
    if layer is None:
        return None
    parts = (layer.bounds, layer.labels, layer.label_scales, layer.channels)
    pointers = (None if part is None else part.data_ptr() for part in parts)
    num_channels = 0 if layer.channels is None else layer.channels.shape[1]
    struct = library.SparseLayer(*pointers, num_channels, (c_int32 * len(Method))(*layer.roles))
    return (library.SparseLayer * 1)(struct)


def rows_struct(sparse: SparseRows | None) -> Array[library.SparseRows] | None:
    if sparse is None:
        return None
    lists = sparse.lists
    pointers = (tensor.data_ptr() for tensor in (sparse.index, sparse.methods, sparse.budgets))
    address, most = (None, 0) if lists is None else (lists.data_ptr(), lists.shape[2])
    return (library.SparseRows * 1)(library.SparseRows(*pointers, address, most))


def check_sparse(rows: AttentionRows, num_kv: int, page_size: int) -> None:
    """Refuse sparse rows that a kernel could not serve or would read outside its memory for."""
    sparse = rows.sparse
    assert sparse is not None
    for name in ("index", "methods", "budgets"):
        tensor = getattr(sparse, name)
        if tensor.dtype != torch.int32 or tensor.ndim != 1 or not tensor.is_contiguous():
            raise TypeError(f"sparse.{name} is {tensor.dtype}; the CPU kernels need a contiguous int32 tensor")
    num_sparse = sparse.methods.shape[0]
    if sparse.index.shape != rows.positions.shape or sparse.budgets.shape[0] != num_sparse:
        raise ValueError("sparse.index has an entry for each row, methods and budgets one for each sparse row")
    if int(sparse.index.max()) >= num_sparse:
        raise ValueError(f"sparse.index names entry {int(sparse.index.max())} of {num_sparse}")
    if rows.tree is not None and bool((rows.tree[sparse.index >= 0] != 0).any()):
        raise ValueError("a row of a tree cannot be sparse")
    for method in Method:
        budgets = sparse.budgets[sparse.methods == method]
        if budgets.numel() and int(budgets.min()) < (least := least_budget(method, page_size)):
            raise ValueError(
                f"a {method.name} row has a budget of {int(budgets.min())} keys; it needs at least {least}"
            )
        if method is Method.TIDAL and budgets.numel():
            _check_lists(sparse, num_kv, int(budgets.max()))


def check_choice(rows: AttentionRows, num_kv: int, layer: SparseLayer) -> None:
    """Refuse rows whose choice has no place to go, or nothing to go by."""
    sparse = rows.sparse
    if sparse is None or layer.labels is None:
        raise ValueError("keys are chosen for sparse rows, by a layer's labels")
    if sparse.budgets.numel():
        _check_lists(sparse, num_kv, int(sparse.budgets.max()))


def of_whole_pages(places_M: Tensor, num_kv: int, page_size: int) -> Tensor:
    """Places, int64, of all keys of the pages that these lie in: what a row hides in a page it reads all the same, and
    weighs with 0. They name one head, of which `slots_of` makes all."""
    first: Tensor = torch.unique(places_M.long() // (num_kv * page_size)) * (num_kv * page_size)
    return (first.unsqueeze(1) + torch.arange(page_size)).flatten()


def slots_of(places_M: Tensor, num_kv: int, page_size: int) -> Tensor:
    """The slots, each once, int64, of places (page * K + head) * S + offset: a tile holds all of a key or none."""
    places = places_M.long()
    slots: Tensor = torch.unique(places // (num_kv * page_size) * page_size + places % page_size)
    return slots


def _check_lists(sparse: SparseRows, num_kv: int, most: int) -> None:
    lists, num_sparse = sparse.lists, sparse.methods.shape[0]
    if lists is None or lists.dtype != torch.int32 or not lists.is_contiguous():
        raise TypeError("sparse rows that follow a list need sparse.lists, a contiguous int32 tensor")
    if lists.shape[:2] != (num_sparse, num_kv) or lists.shape[2] < most:
        raise ValueError(f"sparse.lists is {list(lists.shape)}, not [{num_sparse}, {num_kv}, {most} or more]")

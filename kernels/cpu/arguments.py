"""Argument structs of the attention kernels, and the check that no row points outside its memory.

Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.blocks import AttentionForm
from kernels.cpu import library
from kernels.cpu.sparse import check_sparse, layer_struct, rows_struct
from kernels.hosted import Pages
from kernels.ops import AttentionRows
from kernels.sparse import SparseLayer


class RowsCheck:
    """Checks a step's rows against the pages and the rotary table, once per step and not once per layer."""

    def __init__(self) -> None:
        self._seen: tuple[AttentionRows, list[tuple[object, ...]]] | None = None

    def __call__(self, rows: AttentionRows, num_rows: int, k_pages: Tensor, cos_sin_MR: Tensor | None) -> None:
        """Refuse what would make a kernel read or write outside its memory; once per step and not once per layer."""
        seen = (rows, num_rows, k_pages.shape, None if cos_sin_MR is None else cos_sin_MR.shape)
        if self._seen is not None and self._seen[0] is rows and seen[1:] in self._seen[1]:
            return
        if self._seen is None or self._seen[0] is not rows:
            self._seen = (rows, [])
        num_pages, num_kv, page_size, _ = k_pages.shape
        for name in ("page_table", "row_seq", "positions", "visible", "span_starts"):
            tensor = getattr(rows, name)
            if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
                raise TypeError(f"rows.{name} is {tensor.dtype}; the CPU kernels need a contiguous int32 tensor")
        if rows.slots.dtype != torch.int64 or not rows.slots.is_contiguous():
            raise TypeError(f"rows.slots is {rows.slots.dtype}; the CPU kernels need a contiguous int64 tensor")
        if (
            not rows.row_seq.shape[0]
            == rows.positions.shape[0]
            == rows.visible.shape[0]
            == rows.slots.shape[0]
            == num_rows
        ):
            raise ValueError(f"rows describe {rows.row_seq.shape[0]} rows, the step has {num_rows}")
        if num_rows and not 0 <= int(rows.slots.min()) <= int(rows.slots.max()) < num_pages * page_size:
            raise ValueError(f"a slot lies outside the {num_pages} pages of {page_size}")
        if num_rows and int(rows.visible.max()) > rows.page_table.shape[1] * page_size:
            raise ValueError(f"a row sees more keys than {rows.page_table.shape[1]} pages of {page_size} hold")
        if num_rows and cos_sin_MR is not None and int(rows.positions.max()) >= cos_sin_MR.shape[0]:
            raise ValueError(f"position {int(rows.positions.max())} is past the {cos_sin_MR.shape[0]} rotary positions")
        if rows.tree is not None or rows.tree_starts is not None:
            _check_trees(rows, rows.page_table.shape[1] * page_size)
        if rows.sparse is not None:
            check_sparse(rows, num_kv, page_size)
        self._seen[1].append(seen[1:])


def _check_trees(rows: AttentionRows, capacity: int) -> None:
    """Refuse tree masks that reach outside a sequence's page table."""
    tree, starts = rows.tree, rows.tree_starts
    if tree is None or starts is None:
        raise ValueError("rows.tree and rows.tree_starts come together; one of them is None")
    for name, tensor, dtype in (("tree", tree, torch.int64), ("tree_starts", starts, torch.int32)):
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise TypeError(f"rows.{name} is {tensor.dtype}; the CPU kernels need a contiguous {dtype} tensor")
        if tensor.shape != rows.positions.shape:
            raise ValueError(f"rows.{name} has {tensor.shape[0]} entries, the step has {rows.positions.shape[0]} rows")
    for mask, start in zip(tree.tolist(), starts.tolist(), strict=True):
        # A negative mask has bit 63 set: Python's length of its 64-bit pattern.
        if mask and not 0 <= start <= capacity - (mask & (1 << 64) - 1).bit_length():
            raise ValueError(f"a tree at key {start} reaches outside the {capacity} keys of its page table")


def move_args(
    source: Pages, target: Pages, from_slots: Tensor, to_slots: Tensor, layer: SparseLayer | None
) -> library.MoveArgs:
    """From the pages of one pool to those of another of its shape, or of the same one. Checked: both lists are int64,
    equally long, and inside the pages."""
    (k_pages, v_pages), shape = target, target[0].shape
    if source[0].shape != shape or source[0].dtype != k_pages.dtype:
        raise ValueError(f"keys of {source[0].dtype} {list(source[0].shape)} have no place in {list(shape)}")
    num_pages, num_kv, page_size, head_dim = shape
    for name, slots in (("from_slots", from_slots), ("to_slots", to_slots)):
        if slots.dtype != torch.int64 or slots.ndim != 1 or not slots.is_contiguous():
            raise TypeError(f"{name} is {slots.dtype} {list(slots.shape)}; expected a contiguous list of int64")
        if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_pages * page_size:
            raise ValueError(f"{name} has a slot outside the {num_pages} pages of {page_size}")
    if from_slots.shape != to_slots.shape:
        raise ValueError(f"{from_slots.shape[0]} slots cannot move to {to_slots.shape[0]}")
    return library.MoveArgs(
        source[0].data_ptr(), source[1].data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(),
        from_slots.data_ptr(), to_slots.data_ptr(),
        layer_struct(layer), from_slots.shape[0], num_kv, head_dim, page_size, k_pages.dtype == torch.bfloat16,
    )  # fmt: skip


def qkv_args(
    num_q: int,
    head_dim: int,
    cos_sin_MR: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
    dtype: torch.dtype,
    layer: SparseLayer | None,
) -> library.QkvArgs:
    """All but the qkv and q_out pointers."""
    if k_pages.dtype != dtype or cos_sin_MR.dtype != torch.float32 or not cos_sin_MR.is_contiguous():
        raise TypeError(f"rows are {dtype}, pages {k_pages.dtype}, rotary table {cos_sin_MR.dtype} (expected float32)")
    return library.QkvArgs(
        None, None, k_pages.data_ptr(), v_pages.data_ptr(), cos_sin_MR.data_ptr(),
        None if q_norm_D is None else q_norm_D.data_ptr(), None if k_norm_D is None else k_norm_D.data_ptr(),
        rows.positions.data_ptr(), rows.slots.data_ptr(), layer_struct(layer), rows.slots.shape[0], num_q,
        k_pages.shape[1], head_dim, cos_sin_MR.shape[1], k_pages.shape[2], eps, dtype == torch.bfloat16,
    )  # fmt: skip


def attention_args(
    num_q: int,
    head_dim: int,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
    scale: float,
    window: int | None,
    dtype: torch.dtype,
    layer: SparseLayer | None,
) -> library.AttentionArgs:
    """All but the q and out pointers."""
    num_kv, page_size = k_pages.shape[1:3]
    if num_q % num_kv or num_q // num_kv > library.MAX_GROUP or k_pages.dtype != dtype:
        raise ValueError(f"{num_q} query heads of {dtype} cannot read {num_kv} kv heads of {k_pages.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None")
    if window is not None and layer is not None and rows.sparse is not None:
        raise ValueError("a layer with a window has no sparse attention")
    return library.AttentionArgs(
        None, k_pages.data_ptr(), v_pages.data_ptr(), None, rows.page_table.data_ptr(), rows.row_seq.data_ptr(),
        rows.positions.data_ptr(), rows.visible.data_ptr(), rows.span_starts.data_ptr(),
        None if rows.tree is None else rows.tree.data_ptr(),
        None if rows.tree_starts is None else rows.tree_starts.data_ptr(), rows_struct(rows.sparse),
        layer_struct(layer), rows.page_table.stride(0), rows.span_starts.shape[0] - 1, num_q,
        num_kv, head_dim, page_size, window or 0, scale, dtype == torch.bfloat16,
    )  # fmt: skip


def check_plain(form: AttentionForm, kv_scale_2K: Tensor | None) -> None:
    """Raises ValueError for attention that these kernels do not compute."""
    asked = [
        what
        for what, is_asked in (
            ("a logit softcap", form.softcap != 0.0),
            ("sink keys", form.sinks != 0),
            ("sink logits", form.sink_logits_Q is not None),
            ("scaled fp8 pages", kv_scale_2K is not None),
        )
        if is_asked
    ]
    if asked:
        raise ValueError(
            f"the compiled CPU kernels have no attention with {' and '.join(asked)}; ReferenceOps and TritonOps have"
        )

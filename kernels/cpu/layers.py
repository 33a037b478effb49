"""A run of dense layers as the compiled kernels read it: one C struct a layer, made once and not once per step.

Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, pointer
from weakref import WeakKeyDictionary

from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers, MlpBlock
from kernels.cpu import library
from kernels.cpu.sparse import layer_struct
from kernels.cpu.weights import packed_here
from kernels.sparse import SparseLayer


class LayerTables:
    """The structs of each run of layers, kept for as long as the run lives and has the same pages."""

    def __init__(self) -> None:
        # The pages are kept beside the structs that point into them, so that a pointer is never older than its memory.
        self._known: WeakKeyDictionary[
            DenseLayers, tuple[list[Tensor], Sequence[SparseLayer] | None, Array[library.DenseLayer]]
        ] = WeakKeyDictionary()

    def __call__(
        self,
        run: DenseLayers,
        kv: Sequence[tuple[Tensor, Tensor]],
        x_TH: Tensor,
        sparse: Sequence[SparseLayer] | None,
    ) -> Array[library.DenseLayer]:
        """The structs of `run` over the pages `kv`. sparse: `AttentionRows.layers`.

        Raises ValueError for layers that do not fit x or each other, or have a window and should be sparse.
        """
        pages = [tensor for pair in kv for tensor in pair]
        known = self._known.get(run)
        if known is None or known[1] is not sparse or not _same(known[0], pages):
            known = self._known[run] = (pages, sparse, _structs(run, kv, x_TH, sparse))
        return known[2]


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _structs(
    run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], x_TH: Tensor, sparse: Sequence[SparseLayer] | None
) -> Array[library.DenseLayer]:
    if len(kv) != len(run.layers):
        raise ValueError(f"{len(run.layers)} layers got the pages of {len(kv)}")
    first = _sizes(run.layers[0][0], *kv[0])
    for (attention, _), pages in zip(run.layers, kv, strict=True):
        if _sizes(attention, *pages) != first:
            raise ValueError("the layers of a run must have the same heads, rotary table, and shape and dtype of pages")
    if sparse is not None and any(attention.window is not None for attention, _ in run.layers):
        raise ValueError("a layer with a window has no sparse attention")
    structs = [
        _struct(attention, mlp, k, v, x_TH, None if sparse is None else sparse[attention.layer])
        for (attention, mlp), (k, v) in zip(run.layers, kv, strict=True)
    ]
    return (library.DenseLayer * len(structs))(*structs)


def _sizes(attention: AttentionBlock, k_pages: Tensor, v_pages: Tensor) -> tuple[object, ...]:
    tables = [(t.shape, t.stride(), t.dtype) for t in (attention.cos_sin_MR, k_pages, v_pages)]
    return attention.num_q, attention.num_kv, attention.head_dim, tables


def _struct(
    attention: AttentionBlock,
    mlp: MlpBlock,
    k_pages: Tensor,
    v_pages: Tensor,
    x_TH: Tensor,
    sparse: SparseLayer | None,
) -> library.DenseLayer:
    hidden, heads = x_TH.shape[1], attention.num_q * attention.head_dim
    qkv, out = packed_here(attention.qkv, hidden), packed_here(attention.out, heads)
    gate_up = packed_here(mlp.gate_up, hidden)
    down = packed_here(mlp.down, gate_up.out_features // 2)
    width = heads + 2 * attention.num_kv * attention.head_dim
    if (qkv.out_features, out.out_features, down.out_features) != (width, hidden, hidden):
        raise ValueError(
            f"a layer's products give {qkv.out_features}, {out.out_features} and {down.out_features} features, "
            f"not {width}, {hidden} and {hidden}"
        )
    for norm in (attention.norm_H, mlp.norm_H):
        if norm.shape != (hidden,) or norm.dtype != x_TH.dtype or not norm.is_contiguous():
            raise ValueError(f"norm weight is {norm.dtype} {list(norm.shape)}, rows are {x_TH.dtype} of {hidden}")
    q_norm, k_norm = attention.q_norm_D, attention.k_norm_D
    return library.DenseLayer(
        attention.norm_H.data_ptr(), pointer(qkv.struct), pointer(out.struct),
        None if q_norm is None else q_norm.data_ptr(), None if k_norm is None else k_norm.data_ptr(),
        attention.cos_sin_MR.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(),
        mlp.norm_H.data_ptr(), pointer(gate_up.struct), pointer(down.struct), layer_struct(sparse),
        attention.window or 0, attention.scale, attention.eps, mlp.eps, 0,
    )  # fmt: skip

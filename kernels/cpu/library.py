"""ctypes face of the compiled kernels: the structs of layer.h and linear.h, and every exported function's types.

Each field must stay in the order and of the size that the C++ header gives it.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path

BF16, FLOAT, INT8, INT4 = 0, 1, 2, 3
"""WeightFormat of linear.h."""
PANEL = 32
"""kPanel: output features of a weight panel."""
INT4_GROUP = 32
"""kGroup: inputs that share a scale."""
MAX_GROUP = 512
"""Most query heads per kv head (attention.cpp sizes its row state by it)."""


class Weight(ctypes.Structure):
    """linear.h Weight."""

    _fields_ = (
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("format", c_int32),
        ("dtype", c_int32),
    )


class SparseLayer(ctypes.Structure):
    """layer.h SparseLayer."""

    _fields_ = (
        *((name, c_void_p) for name in ("bounds", "labels", "label_scales", "channels")),
        ("num_channels", c_int64),
        ("roles", c_int32 * 4),
    )


class SparseRows(ctypes.Structure):
    """layer.h SparseRows."""

    _fields_ = (
        *((name, c_void_p) for name in ("index", "methods", "budgets", "lists")),
        ("most", c_int64),
    )


class QkvArgs(ctypes.Structure):
    """layer.h QkvArgs."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "q_out", "k_pages", "v_pages", "cos_sin", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("positions", "slots")),
        ("layer", POINTER(SparseLayer)),
        *((name, c_int64) for name in ("rows", "num_q", "num_kv", "head_dim", "rotary_dim", "page_size")),
        ("eps", c_float),
        ("is_bf16", c_int32),
    )


class AttentionArgs(ctypes.Structure):
    """layer.h AttentionArgs."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k_pages", "v_pages", "out")),
        *((name, c_void_p) for name in ("page_table", "row_seq", "positions", "visible", "span_starts")),
        *((name, c_void_p) for name in ("tree", "tree_starts")),
        ("sparse", POINTER(SparseRows)),
        ("layer", POINTER(SparseLayer)),
        *((name, c_int64) for name in ("max_pages", "num_spans", "num_q", "num_kv", "head_dim", "page_size", "window")),
        ("scale", c_float),
        ("is_bf16", c_int32),
    )


class MoveArgs(ctypes.Structure):
    """layer.h MoveArgs."""

    _fields_ = (
        *((name, c_void_p) for name in ("k_from", "v_from", "k_pages", "v_pages", "from_slots", "to_slots")),
        ("layer", POINTER(SparseLayer)),
        *((name, c_int64) for name in ("count", "num_kv", "head_dim", "page_size")),
        ("is_bf16", c_int32),
    )


class AttentionBlockArgs(ctypes.Structure):
    """layer.h AttentionBlockArgs."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "norm", "out")),
        ("qkv_weight", POINTER(Weight)),
        ("out_weight", POINTER(Weight)),
        ("qkv", QkvArgs),
        ("attention", AttentionArgs),
    )


class DenseLayer(ctypes.Structure):
    """layer.h DenseLayer."""

    _fields_ = (
        ("norm", c_void_p),
        ("qkv_weight", POINTER(Weight)),
        ("out_weight", POINTER(Weight)),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "cos_sin", "k_pages", "v_pages", "mlp_norm")),
        ("gate_up", POINTER(Weight)),
        ("down", POINTER(Weight)),
        ("sparse", POINTER(SparseLayer)),
        ("window", c_int64),
        *((name, c_float) for name in ("scale", "eps", "mlp_eps")),
        ("unused", c_int32),
    )


class DenseLayersArgs(ctypes.Structure):
    """layer.h DenseLayersArgs."""

    _fields_ = (("step", AttentionBlockArgs), ("layers", POINTER(DenseLayer)), ("num_layers", c_int64))


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "braid_pool_create": (c_void_p, [c_int]),
    "braid_prefer_huge_pages": (None, [c_void_p, c_int64]),
    "braid_linear": (None, [c_void_p, POINTER(Weight), c_void_p, c_int64, c_void_p, c_void_p, c_int]),
    "braid_pack": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int, c_void_p]),
    "braid_rms_norm": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int, c_void_p]),
    "braid_silu_mul": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int, c_void_p]),
    "braid_qkv_rope_write": (None, [c_void_p, POINTER(QkvArgs)]),
    "braid_move_kv": (None, [POINTER(MoveArgs)]),
    "braid_paged_attention": (None, [c_void_p, POINTER(AttentionArgs)]),
    "braid_choose_keys": (None, [c_void_p, POINTER(AttentionArgs)]),
    "braid_attention_block": (None, [c_void_p, POINTER(AttentionBlockArgs)]),
    "braid_dense_layers": (None, [c_void_p, POINTER(DenseLayersArgs)]),
    "braid_sample": (None, [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_uint32, c_void_p]),
    "braid_row_statistics": (None, [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 3]),
}


def load(path: Path) -> ctypes.CDLL:
    """Load a built library and bind its functions. Calls release Python's lock while they run."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library

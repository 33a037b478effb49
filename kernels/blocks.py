"""Attention with its residual, and whole dense layers, as single operations, and what they are made of.

A back end may run all of it in one call: Python between the products is slow, because the weights that stream past have
emptied the caches it needs (24 calls a step took 0.5 ms of a one-row step of 8 ms on a CPU). These compositions are the
definition, and what a back end without a fused form uses.

Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kernels.ops import AttentionRows, Ops, PackedLinear
    from kernels.sparse import SparseLayer


@dataclass(frozen=True, eq=False)
class AttentionForm:
    """What some models do to their scores besides the scale; the default is plain softmax.

    softcap        c of c tanh(score / c), after the scale and before the mask (Gemma 2); 0 = none
    sinks          first keys of a sequence that a row sees besides its window (StreamingLLM); no meaning without one
    sink_logits_Q  float32, a learned logit of each query head that joins the softmax and has no value (GPT-OSS)
    """

    softcap: float = 0.0
    sinks: int = 0
    sink_logits_Q: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.softcap == 0.0 and self.sinks == 0 and self.sink_logits_Q is None


PLAIN = AttentionForm()


def check_sparse(form: AttentionForm, k_pages: Tensor, q_TQD: Tensor) -> None:
    """Raises ValueError for attention that sparse rows do not have: they choose by plain scores of keys as they are."""
    if form.softcap or form.sinks or form.sink_logits_Q is not None:
        raise ValueError("sparse rows have no softcap, sink keys or sink logits")
    if k_pages.dtype != q_TQD.dtype:
        raise ValueError(f"sparse rows read pages of the model's dtype {q_TQD.dtype}, not of {k_pages.dtype}")


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """Pre-norm self-attention with its residual: x + out(attend(rope(qkv(norm(x))))). Fields as in `Ops`' methods.

    layer  its index in the model
    """

    norm_H: Tensor
    qkv: PackedLinear
    out: PackedLinear
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    num_q: int
    num_kv: int
    head_dim: int
    cos_sin_MR: Tensor
    eps: float
    scale: float
    window: int | None
    form: AttentionForm = PLAIN
    kv_scale_2K: Tensor | None = None
    layer: int = 0

    def sparse(self, rows: AttentionRows) -> SparseLayer | None:
        """This layer's part in sparse attention, where the step's KV memory has any."""
        return None if rows.layers is None else rows.layers[self.layer]


@dataclass(frozen=True, eq=False)
class MlpBlock:
    """Pre-norm gated MLP with its residual: x + down(silu_mul(gate_up(norm(x))))."""

    norm_H: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    eps: float


@dataclass(frozen=True, eq=False)
class DenseLayers:
    """Decoder layers that follow each other and have dense MLPs; all have the same sizes."""

    layers: tuple[tuple[AttentionBlock, MlpBlock], ...]


def composed_attention_block(
    ops: Ops, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
) -> Tensor:
    """The attention half of a layer from `Ops`' single operations; writes K and V, returns the new residual stream."""
    b, layer = block, block.sparse(rows)
    qkv_TX = ops.linear(ops.rms_norm(x_TH, b.norm_H, b.eps), b.qkv)
    q_TQD = ops.qkv_rope_write(
        qkv_TX, b.num_q, b.num_kv, b.head_dim, b.cos_sin_MR, b.q_norm_D, b.k_norm_D, b.eps, k_pages, v_pages, rows,
        b.kv_scale_2K,
        layer,
    )  # fmt: skip
    out_TQD = ops.paged_attention(q_TQD, k_pages, v_pages, rows, b.scale, b.window, b.form, b.kv_scale_2K, layer)
    return ops.linear(out_TQD.flatten(1), b.out, x_TH)


def composed_mlp_block(ops: Ops, x_TH: Tensor, mlp: MlpBlock) -> Tensor:
    """The other half, likewise."""
    hidden_TX = ops.linear(ops.rms_norm(x_TH, mlp.norm_H, mlp.eps), mlp.gate_up)
    return ops.linear(ops.silu_mul(hidden_TX), mlp.down, x_TH)


def composed_dense_layers(
    ops: Ops, x_TH: Tensor, run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], rows: AttentionRows
) -> Tensor:
    """Layers one after another; kv[i] is layer i's (k_pages, v_pages). Returns the new residual stream."""
    for (attention, mlp), (k_pages, v_pages) in zip(run.layers, kv, strict=True):
        x_TH = composed_attention_block(ops, x_TH, attention, k_pages, v_pages, rows)
        x_TH = composed_mlp_block(ops, x_TH, mlp)
    return x_TH

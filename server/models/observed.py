"""A model whose layers are looked at: what every layer's attention is given, queries and keys as they meet.

For whoever needs to know what a model attends to (a drift test, calibration of sparse attention). Nothing is computed
otherwise than by `kernels.blocks`' compositions; keys are computed beside the pages, whose layout is the back end's
secret. Steps that nobody looks at run the back end's fused layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers, composed_mlp_block
from kernels.ops import AttentionRows, Ops
from kernels.reference import rotate

See = Callable[[Tensor, Tensor, float], None]
"""Is given the step's q [T, Q, D] and k [T, K, D], normalised and rotated, and the scale of their product: once a
layer, in the order of the layers."""


class ObservedLayers:
    """`model.through(ObservedLayers(ops, see))` is the model with its layers looked at."""

    def __init__(self, ops: Ops, see: See) -> None:
        self._ops, self._see = ops, see

    def dense_layers(
        self, x_TH: Tensor, run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], rows: AttentionRows
    ) -> Tensor:
        """`blocks.composed_dense_layers` with this attention."""
        ops = self._ops
        for (attention, mlp), (k_pages, v_pages) in zip(run.layers, kv, strict=True):
            x_TH = self.attention_block(x_TH, attention, k_pages, v_pages, rows)
            x_TH = composed_mlp_block(ops, x_TH, mlp)
        return x_TH

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor:
        """`blocks.composed_attention_block`, and a look at what it computes on the way."""
        ops, b, layer = self._ops, block, block.sparse(rows)
        qkv_TX = ops.linear(ops.rms_norm(x_TH, b.norm_H, b.eps), b.qkv)
        k_TKD = self._rotated_keys(qkv_TX, b, rows)
        q_TQD = ops.qkv_rope_write(
            qkv_TX,
            b.num_q,
            b.num_kv,
            b.head_dim,
            b.cos_sin_MR,
            b.q_norm_D,
            b.k_norm_D,
            b.eps,
            k_pages,
            v_pages,
            rows,
            b.kv_scale_2K,
            layer,
        )
        self._see(q_TQD, k_TKD, b.scale)
        out_TQD = ops.paged_attention(q_TQD, k_pages, v_pages, rows, b.scale, b.window, b.form, b.kv_scale_2K, layer)
        return ops.linear(out_TQD.flatten(1), b.out, x_TH)

    def _rotated_keys(self, qkv_TX: Tensor, block: AttentionBlock, rows: AttentionRows) -> Tensor:
        """The keys that `qkv_rope_write` is about to store, [T, K, D]: it may write over its input."""
        heads = qkv_TX.view(qkv_TX.shape[0], -1, block.head_dim)
        k_TKD = heads[:, block.num_q : block.num_q + block.num_kv]
        if block.k_norm_D is not None:
            k_TKD = self._ops.rms_norm(k_TKD, block.k_norm_D, block.eps)
        return rotate(k_TKD, block.cos_sin_MR[rows.positions.long()].unsqueeze(1))

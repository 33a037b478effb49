"""`TritonOps`: the CUDA back end of `Ops`. Our kernels for all but the products, which are cuBLAS's through torch.

Runs on CPU tensors too where Triton interprets (TRITON_INTERPRET=1), which is for tests: thousands of times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.blocks import (
    PLAIN,
    AttentionBlock,
    AttentionForm,
    DenseLayers,
    check_sparse,
    composed_attention_block,
)
from kernels.edits import Edits
from kernels.hosted import Pages
from kernels.kv_format import FP8, stored_dtypes
from kernels.ops import AttentionRows, PackedLinear, RowStatistics, StepRows
from kernels.prefill_rows import attend_in_parts
from kernels.reference import DenseLinear, ReferenceOps, dense_weight
from kernels.routing import Router, choose_experts
from kernels.sparse import Roles, SparseLayer
from kernels.triton.edits import edit_logits
from kernels.triton.moe import ExpertStack, moe, pack_experts
from kernels.triton.move import move_kv
from kernels.triton.norm import add_rms_norm, rms_norm
from kernels.triton.paged import PagedAttention
from kernels.triton.rope import qkv_rope_write
from kernels.triton.sample import sample
from kernels.triton.silu import silu_mul
from kernels.triton.sparse.attend import SparseAttention
from kernels.triton.sparse.fetch import copy_keys
from kernels.triton.sparse.metadata import write_metadata
from kernels.triton.sparse.prefill import attend_part
from kernels.triton.statistics import row_statistics
from kernels.triton.truncate import truncate
from kernels.truncation import Filters


class TritonOps:
    """`Ops` on a CUDA device, and `FixedPlans`.

    quantization  None, "int8" or "int4": as in `ReferenceOps`, the rounding without the saving
    num_programs  pieces that attention's work is cut into; default: by the device's multiprocessors
    deterministic  attention gives a row the same bits whatever sequences are beside it (README, rule 8)
    """

    def __init__(
        self, quantization: str | None = None, num_programs: int | None = None, deterministic: bool = False
    ) -> None:
        self._quantization, self._num_programs = quantization, num_programs
        self._torch = ReferenceOps(quantization)
        self._num_sms = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 1
        self.deterministic = deterministic
        self._attention = self.another_attention()
        self._sparse = SparseAttention(self._attention, self._num_sms, num_programs, deterministic)
        # Its lists are another kv head's each: what they share is no prefix to plan by.
        self._prefill = PagedAttention(self._num_sms, num_programs, deterministic, cascade=False)
        self.owns_threads = False
        self.name = "triton" if quantization is None else f"triton-{quantization}"

    def another(self) -> TritonOps:
        """One with the same settings that shares no plan, list or scratch: for a graph that outlives others' steps."""
        return type(self)(self._quantization, self._num_programs, self.deterministic)

    def another_attention(self) -> PagedAttention:
        """Likewise, what it runs dense attention with."""
        return PagedAttention(self._num_sms, self._num_programs, self.deterministic)

    def pack_linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> DenseLinear:
        return self._torch.pack_linear(weight_NK, bias_N)

    def pack_experts(self, num_experts: int, weight_of: Callable[[int], Tensor]) -> ExpertStack:
        return pack_experts(num_experts, lambda expert: self.pack_linear(weight_of(expert)).weight_NK)

    def linear(self, x_TK: Tensor, weight: PackedLinear, residual_TN: Tensor | None = None) -> Tensor:
        return self._torch.linear(x_TK, weight, residual_TN)

    def logits(self, x_JK: Tensor, weight: PackedLinear) -> Tensor:
        dense = dense_weight(weight)
        if not x_JK.is_cuda or x_JK.dtype == torch.float32:
            return self._torch.logits(x_JK, weight)
        # The product's float32 sums as they are: no widened copy of the head, no rounding on the way.
        logits_JV = torch.mm(x_JK, dense.weight_NK.t(), out_dtype=torch.float32)
        return logits_JV if dense.bias_N is None else logits_JV + dense.bias_N.float()

    def embed(self, table_VH: Tensor, ids_T: Tensor) -> Tensor:
        return self._torch.embed(table_VH, ids_T)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return rms_norm(x_TH, weight_H, eps)

    def qkv_rope_write(
        self,
        qkv_TX: Tensor,
        num_q: int,
        num_kv: int,
        head_dim: int,
        cos_sin_MR: Tensor,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        eps: float,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: AttentionRows,
        kv_scale_2K: Tensor | None = None,
        layer: SparseLayer | None = None,
    ) -> Tensor:
        q_TQD = qkv_rope_write(
            qkv_TX, num_q, num_kv, head_dim, cos_sin_MR, q_norm_D, k_norm_D, eps, k_pages, v_pages, rows, kv_scale_2K
        )
        if layer is not None:
            write_metadata(k_pages, rows.slots, layer)
        return q_TQD

    def paged_attention(
        self,
        q_TQD: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: AttentionRows,
        scale: float,
        window: int | None = None,
        form: AttentionForm = PLAIN,
        kv_scale_2K: Tensor | None = None,
        layer: SparseLayer | None = None,
    ) -> Tensor:
        if rows.prefill is not None:
            check_sparse(form, k_pages, q_TQD)
            return attend_in_parts(
                q_TQD.contiguous(), rows.prefill, window,
                lambda others: self.paged_attention(q_TQD, k_pages, v_pages, others, scale, layer=layer),
                lambda part, q: attend_part(self._prefill, q, k_pages, v_pages, rows.page_table, part, scale),
            )  # fmt: skip
        if rows.sparse is None or layer is None:
            return self._attention.run(q_TQD, k_pages, v_pages, rows, scale, window, form, kv_scale_2K)
        check_sparse(form, k_pages, q_TQD)
        return self._sparse.run(q_TQD, k_pages, v_pages, rows, scale, window, layer)

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor:
        return composed_attention_block(self, x_TH, block, k_pages, v_pages, rows)

    def dense_layers(
        self, x_TH: Tensor, run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], rows: AttentionRows
    ) -> Tensor:
        """`composed_dense_layers` with each residual added in the norm that follows it."""
        change_TH: Tensor | None = None  # what the last half layer adds to x
        for (attention, mlp), (k_pages, v_pages) in zip(run.layers, kv, strict=True):
            a = attention
            layer = a.sparse(rows)
            normed_TH, x_TH = self._add_norm(x_TH, change_TH, a.norm_H, a.eps)
            q_TQD = self.qkv_rope_write(
                self.linear(normed_TH, a.qkv), a.num_q, a.num_kv, a.head_dim, a.cos_sin_MR, a.q_norm_D, a.k_norm_D,
                a.eps, k_pages, v_pages, rows, a.kv_scale_2K, layer,
            )  # fmt: skip
            out_TQD = self.paged_attention(
                q_TQD, k_pages, v_pages, rows, a.scale, a.window, a.form, a.kv_scale_2K, layer
            )
            normed_TH, x_TH = self._add_norm(x_TH, self.linear(out_TQD.flatten(1), a.out), mlp.norm_H, mlp.eps)
            change_TH = self.linear(self.silu_mul(self.linear(normed_TH, mlp.gate_up)), mlp.down)
        return x_TH if change_TH is None else x_TH + change_TH

    def _add_norm(self, x_TH: Tensor, change_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if change_TH is None:
            return self.rms_norm(x_TH, weight_H, eps), x_TH
        return add_rms_norm(change_TH, x_TH, weight_H, eps)

    def silu_mul(self, gate_up_TX: Tensor) -> Tensor:
        return silu_mul(gate_up_TX)

    def moe(
        self,
        x_TH: Tensor,
        router_logits_TE: Tensor,
        router: Router,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
    ) -> Tensor:
        weights_Tk, experts_Tk = choose_experts(router_logits_TE, router)
        return moe(x_TH, weights_Tk, experts_Tk, gate_up, down)

    def row_statistics(self, logits_JV: Tensor, ids_J: Tensor) -> RowStatistics:
        return row_statistics(logits_JV, ids_J)

    def edit_logits(self, logits_JV: Tensor, edits: Edits) -> None:
        edit_logits(logits_JV, edits)

    def truncate(self, logits_JV: Tensor, filters: Filters) -> None:
        truncate(logits_JV, filters, self._num_sms)

    def sample(
        self,
        logits_JV: Tensor,
        seeds_J: Tensor,
        sample_index_J: Tensor,
        positions_J: Tensor,
        greedy_J: Tensor,
        stream: int = 0,
    ) -> Tensor:
        return sample(logits_JV, seeds_J, sample_index_J, positions_J, greedy_J, stream)

    def plan_words(self, num_rows: int) -> int:
        return self._attention.plan_words(num_rows)

    def fix_plans(self, rows: AttentionRows, words: Tensor) -> None:
        self._attention.fix_plans(rows, words)

    def write_plans(self, host: StepRows, words: NDArray[np.int32]) -> None:
        self._attention.write_plans(host, words)

    def move_kv(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        from_slots_M: Tensor,
        to_slots_M: Tensor,
        layer: SparseLayer | None = None,
    ) -> None:
        move_kv(k_pages, v_pages, from_slots_M, to_slots_M)
        if layer is not None:
            write_metadata(k_pages, to_slots_M, layer)

    def choose_keys(
        self, q_TQD: Tensor, k_pages: Tensor, rows: AttentionRows, scale: float, layer: SparseLayer
    ) -> Tensor:
        return self._sparse.choose(q_TQD, k_pages, rows, scale, layer)

    def copy_keys(self, source: Pages, target: Pages, places_M: Tensor) -> None:
        copy_keys(source, target, places_M)

    def kv_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """fp8 e4m3 needs a GPU that converts it: compute capability 8.9 and above."""
        has_fp8 = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)
        return tuple(kind for kind in stored_dtypes(dtype) if kind != FP8 or has_fp8)

    def allocate_kv(
        self, num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        return self._torch.allocate_kv(num_pages, page_size, num_kv, head_dim, dtype, device)

    def allocate_sparse(
        self,
        k_pages: Tensor,
        roles: Roles,
        has_bounds: bool,
        channels_KC: Tensor | None,
        int4_labels: bool = False,
    ) -> SparseLayer:
        return self._torch.allocate_sparse(k_pages, roles, has_bounds, channels_KC, int4_labels)

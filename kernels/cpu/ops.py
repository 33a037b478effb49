"""`Ops` on the compiled CPU kernels, for bfloat16 and float32.

This file checks shapes and passes pointers; it computes nothing itself except the sums of `moe`.
The rule: every row's result is bitwise the same whatever the other rows are, and whatever the number of threads is.
Legend of shapes in kernels/ops.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from ctypes import byref, pointer
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.blocks import (
    PLAIN,
    AttentionBlock,
    AttentionForm,
    DenseLayers,
    composed_attention_block,
    composed_dense_layers,
)
from kernels.cpu import library
from kernels.cpu.arguments import RowsCheck, attention_args, check_plain, move_args, qkv_args
from kernels.cpu.build import BuildError, best_variant, cpu_flags, library_path
from kernels.cpu.layers import LayerTables
from kernels.cpu.paging import CpuLayout, page_memory, trim
from kernels.cpu.sparse import allocate, check_choice, of_whole_pages, slots_of
from kernels.cpu.weights import CpuLinear, activations, is_bf16, packed_here, quantised_panels
from kernels.edits import Edits, edit_logits
from kernels.hosted import Pages, chosen_places
from kernels.ops import AttentionRows, PackedLinear, RowStatistics
from kernels.prefill_rows import attend_in_parts
from kernels.prefill_torch import attend_part
from kernels.routing import Router, choose_experts
from kernels.sparse import Roles, SparseLayer
from kernels.truncation import Filters, truncate

AMX_ROWS = 16
"""A tile of the AMX unit has 16 rows; below, memory bandwidth bounds the product and nothing is gained."""


def default_num_threads() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0))


class CpuOps:
    """`Ops` through the C++ kernels of this folder.

    quantization  None, "int8" (a scale per output) or "int4" (a scale per output and 32 inputs); weight-only, lossy
    num_threads   threads of a step, the calling one included; default: the cores this process may run on
    onednn_rows   from this many rows on, bfloat16 products go to oneDNN, which keeps a second copy of the weights and
                  does not promise that a row is the same in any company. None: never; "auto": 16 on CPUs with AMX (a
                  matrix unit that these kernels do not use), else never. Quantised weights never go there.
    variant, directory  which build to load and from where (kernels/cpu/build.py); default: the best for this CPU
    Raises        BuildError if there is no library and none can be built.
    """

    def __init__(
        self,
        quantization: str | None = None,
        num_threads: int | None = None,
        onednn_rows: int | Literal["auto"] | None = "auto",
        variant: str | None = None,
        directory: Path | None = None,
    ) -> None:
        if quantization not in (None, "int8", "int4"):
            raise ValueError(f"quantization is {quantization!r}; supported are 'int8' and 'int4'")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
        self.quantization = quantization
        if onednn_rows == "auto":
            onednn_rows = AMX_ROWS if {"amx_tile", "amx_bf16"} <= cpu_flags() else None
        self.onednn_rows = None if quantization else onednn_rows
        self.owns_threads = self.onednn_rows is None
        self.num_threads = num_threads or default_num_threads()
        self.variant = variant or best_variant()
        self.name = f"cpu-{self.variant}" if quantization is None else f"cpu-{self.variant}-{quantization}"
        path = library_path(self.variant, directory)
        try:
            self._lib = library.load(path)
        except OSError as error:  # e.g. a cache on a file system mounted noexec
            raise BuildError(f"cannot load the compiled CPU kernels from {path}: {error}") from error
        self._pool = self._lib.braid_pool_create(self.num_threads)
        self._check_rows = RowsCheck()
        self._layer_tables = LayerTables()
        self._layout = CpuLayout(self._lib, self._pool)

    def pack_linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> CpuLinear:
        narrow = is_bf16(weight_NK)
        num_out, num_in = weight_NK.shape
        padded = -(-num_out // library.PANEL) * library.PANEL
        tensors, layout = self._panels(weight_NK, padded)
        bias = None
        if bias_N is not None:
            bias = F.pad(bias_N.float(), (0, padded - num_out)).contiguous()
            tensors = (*tensors, bias)
        struct = library.Weight(
            panels=tensors[0].data_ptr(),
            scales=tensors[1].data_ptr() if self.quantization else None,
            bias=None if bias is None else bias.data_ptr(),
            n=num_out,
            k=num_in,
            format=layout,
            dtype=library.BF16 if narrow else library.FLOAT,
        )
        onednn = None
        if narrow and self.onednn_rows is not None:
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous())
            onednn = (reordered, None if bias_N is None else bias_N.to(torch.bfloat16))
        return CpuLinear(num_out, num_in, struct, tensors, onednn)

    def pack_experts(self, num_experts: int, weight_of: Callable[[int], Tensor]) -> list[CpuLinear]:
        return [self.pack_linear(weight_of(expert)) for expert in range(num_experts)]

    def _panels(self, weight_NK: Tensor, padded_out: int) -> tuple[tuple[Tensor, ...], int]:
        """The weight in its panel layout (and scales), and the layout's WeightFormat."""
        num_out, num_in = weight_NK.shape
        per_word = 4 // weight_NK.element_size()
        steps = -(-num_in // per_word)
        if self.quantization is None:
            weight = weight_NK.contiguous()
            panels = torch.empty(padded_out * steps * per_word, dtype=weight.dtype)
            self._lib.braid_pack(
                self._pool, weight.data_ptr(), num_out, num_in, weight.element_size(), panels.data_ptr()
            )
            return (panels,), library.BF16 if per_word == 2 else library.FLOAT
        return quantised_panels(weight_NK, padded_out, self.quantization)

    def linear(self, x_TK: Tensor, weight: PackedLinear, residual_TN: Tensor | None = None) -> Tensor:
        packed = packed_here(weight, x_TK.shape[1])
        x = activations(x_TK, packed)
        y_TN = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype)
        residual = None
        if residual_TN is not None:
            if residual_TN.shape != y_TN.shape or residual_TN.dtype != y_TN.dtype:
                raise ValueError(
                    f"residual is {residual_TN.dtype} {list(residual_TN.shape)}, not as {list(y_TN.shape)}"
                )
            residual_TN = residual_TN.contiguous()
            residual = residual_TN.data_ptr()
        if packed.onednn is not None and self._prefers_onednn(x):
            y = torch.ops.mkldnn._linear_pointwise(x, *packed.onednn, "none", [], "")
            return cast(Tensor, y if residual_TN is None else y + residual_TN)
        self._lib.braid_linear(self._pool, packed.struct, x.data_ptr(), x.shape[0], residual, y_TN.data_ptr(), 0)
        return y_TN

    def _prefers_onednn(self, x_TK: Tensor) -> bool:
        return self.onednn_rows is not None and x_TK.dtype == torch.bfloat16 and x_TK.shape[0] >= self.onednn_rows

    def logits(self, x_JK: Tensor, weight: PackedLinear) -> Tensor:
        packed = packed_here(weight, x_JK.shape[1])
        x = activations(x_JK, packed)
        y_JV = torch.empty((x.shape[0], packed.out_features), dtype=torch.float32)
        self._lib.braid_linear(self._pool, packed.struct, x.data_ptr(), x.shape[0], None, y_JV.data_ptr(), 1)
        return y_JV

    def embed(self, table_VH: Tensor, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, table_VH)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x, weight = x_TH.contiguous(), weight_H.contiguous()
        size = x.shape[-1]
        if weight.shape != (size,) or weight.dtype != x.dtype:
            raise ValueError(f"norm weight is {weight.dtype} {list(weight.shape)}, rows are {x.dtype} of {size}")
        out = torch.empty_like(x)
        rows = x.numel() // size
        self._lib.braid_rms_norm(
            self._pool, x.data_ptr(), weight.data_ptr(), rows, size, eps, is_bf16(x), out.data_ptr()
        )
        return out

    def silu_mul(self, gate_up_TX: Tensor) -> Tensor:
        x = gate_up_TX.contiguous()
        size = x.shape[-1] // 2
        out = torch.empty((x.shape[0], size), dtype=x.dtype)
        self._lib.braid_silu_mul(self._pool, x.data_ptr(), x.shape[0], size, is_bf16(x), out.data_ptr())
        return out

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
        check_plain(PLAIN, kv_scale_2K)
        qkv = qkv_TX.contiguous()
        if qkv.shape[1] != (num_q + 2 * num_kv) * head_dim:
            raise ValueError(f"qkv rows have {qkv.shape[1]} features, not ({num_q} + 2 * {num_kv}) * {head_dim}")
        self._check_rows(rows, qkv.shape[0], k_pages, cos_sin_MR)
        q_TQD = torch.empty((qkv.shape[0], num_q, head_dim), dtype=qkv.dtype)
        struct = qkv_args(
            num_q, head_dim, cos_sin_MR, q_norm_D, k_norm_D, eps, k_pages, v_pages, rows, qkv.dtype, layer
        )
        struct.qkv, struct.q_out = qkv.data_ptr(), q_TQD.data_ptr()
        self._lib.braid_qkv_rope_write(self._pool, byref(struct))
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
        check_plain(form, kv_scale_2K)
        q = q_TQD.contiguous()
        if rows.prefill is not None:
            return attend_in_parts(
                q, rows.prefill, window,
                lambda others: self.paged_attention(q, k_pages, v_pages, others, scale, layer=layer),
                lambda part, rows_q: attend_part(
                    self._layout, lambda q, k, v, lists: self.paged_attention(q, k, v, lists, scale),
                    rows_q, k_pages, v_pages, rows.page_table[part.sequence], part, scale,
                ),
            )  # fmt: skip
        self._check_rows(rows, q.shape[0], k_pages, None)
        out_TQD = torch.empty_like(q)
        struct = attention_args(q.shape[1], q.shape[2], k_pages, v_pages, rows, scale, window, q.dtype, layer)
        struct.q, struct.out = q.data_ptr(), out_TQD.data_ptr()
        self._lib.braid_paged_attention(self._pool, byref(struct))
        return out_TQD

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor:
        if rows.prefill is not None or self._prefers_onednn(x_TH):
            return composed_attention_block(self, x_TH, block, k_pages, v_pages, rows)
        x = activations(x_TH, packed_here(block.qkv, x_TH.shape[1]))
        out_TH = torch.empty_like(x)
        self._check_rows(rows, x.shape[0], k_pages, block.cos_sin_MR)
        struct = self._attention_struct(x, out_TH, block, k_pages, v_pages, rows)
        self._lib.braid_attention_block(self._pool, byref(struct))
        return out_TH

    def _attention_struct(
        self, x: Tensor, out_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> library.AttentionBlockArgs:
        check_plain(block.form, block.kv_scale_2K)
        layer = block.sparse(rows)
        qkv, out = packed_here(block.qkv, x.shape[1]), packed_here(block.out, block.num_q * block.head_dim)
        return library.AttentionBlockArgs(
            x.data_ptr(), block.norm_H.data_ptr(), out_TH.data_ptr(), pointer(qkv.struct), pointer(out.struct),
            qkv_args(block.num_q, block.head_dim, block.cos_sin_MR, block.q_norm_D, block.k_norm_D, block.eps,
                      k_pages, v_pages, rows, x.dtype, layer),
            attention_args(block.num_q, block.head_dim, k_pages, v_pages, rows, block.scale, block.window, x.dtype,
                           layer),
        )  # fmt: skip

    def dense_layers(
        self, x_TH: Tensor, run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], rows: AttentionRows
    ) -> Tensor:
        if rows.prefill is not None or self._prefers_onednn(x_TH):
            return composed_dense_layers(self, x_TH, run, kv, rows)
        (block, _), (k_pages, v_pages) = run.layers[0], kv[0]
        x = activations(x_TH, packed_here(block.qkv, x_TH.shape[1]))
        layers, out_TH = self._layer_tables(run, kv, x, rows.layers), torch.empty_like(x)
        self._check_rows(rows, x.shape[0], k_pages, block.cos_sin_MR)
        struct = library.DenseLayersArgs(
            self._attention_struct(x, out_TH, block, k_pages, v_pages, rows), layers, len(layers)
        )
        self._lib.braid_dense_layers(self._pool, byref(struct))
        return out_TH

    def moe(
        self,
        x_TH: Tensor,
        router_logits_TE: Tensor,
        router: Router,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
    ) -> Tensor:
        num_rows, top_k = x_TH.shape[0], router.top_k
        weights_Tk, experts_Tk = choose_experts(router_logits_TE, router)
        order = experts_Tk.flatten().argsort(stable=True)
        counts = torch.bincount(experts_Tk.flatten(), minlength=len(gate_up)).tolist()
        # One output per (row, choice), so that a row's sum runs over its choices in rank order, whoever else is there.
        y_RH = torch.empty((num_rows * top_k, x_TH.shape[1]), dtype=x_TH.dtype)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                chosen = order[start : start + count]
                hidden = self.silu_mul(self.linear(x_TH[chosen // top_k], gate_up[expert]))
                y_RH[chosen] = self.linear(hidden, down[expert])
                start += count
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32)
        y_TkH = y_RH.view(num_rows, top_k, -1)
        for choice in range(top_k):
            out_TH += y_TkH[:, choice].float() * weights_Tk[:, choice, None]
        return out_TH.to(x_TH.dtype)

    def edit_logits(self, logits_JV: Tensor, edits: Edits) -> None:
        edit_logits(logits_JV, edits)

    def truncate(self, logits_JV: Tensor, filters: Filters) -> None:
        truncate(logits_JV, filters)

    def sample(
        self,
        logits_JV: Tensor,
        seeds_J: Tensor,
        sample_index_J: Tensor,
        positions_J: Tensor,
        greedy_J: Tensor,
        stream: int = 0,
    ) -> Tensor:
        logits = logits_JV.contiguous()
        if logits.dtype != torch.float32 or greedy_J.dtype != torch.bool:
            raise TypeError(f"logits are {logits.dtype} and greedy is {greedy_J.dtype}; expected float32 and bool")
        keys = [tensor.to(torch.int64).contiguous() for tensor in (seeds_J, sample_index_J, positions_J)]
        greedy, out_J = greedy_J.contiguous(), torch.empty(logits.shape[0], dtype=torch.int64)
        self._lib.braid_sample(
            self._pool, logits.data_ptr(), *logits.shape, *(key.data_ptr() for key in keys),
            greedy.data_ptr(), stream, out_J.data_ptr(),
        )  # fmt: skip
        return out_J

    def row_statistics(self, logits_JV: Tensor, ids_J: Tensor) -> RowStatistics:
        logits, ids = logits_JV.contiguous(), ids_J.to(torch.int64).contiguous()
        rows, vocab = logits.shape
        if logits.dtype != torch.float32:
            raise TypeError(f"logits are {logits.dtype}; expected float32")
        least, most = ids.aminmax() if rows else (0, 0)
        if int(least) < 0 or int(most) >= vocab:
            raise IndexError(f"ids of row_statistics are {ids.tolist()}, but the logits have {vocab} tokens")
        best_J, values = torch.empty(rows, dtype=torch.int64), torch.empty((5, rows))
        self._lib.braid_row_statistics(
            self._pool, logits.data_ptr(), rows, vocab, ids.data_ptr(), best_J.data_ptr(), values.data_ptr()
        )
        return RowStatistics(best_J, *values.unbind(0))

    def move_kv(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        from_slots_M: Tensor,
        to_slots_M: Tensor,
        layer: SparseLayer | None = None,
    ) -> None:
        pages = (k_pages, v_pages)
        self._lib.braid_move_kv(byref(move_args(pages, pages, from_slots_M, to_slots_M, layer)))

    def choose_keys(
        self, q_TQD: Tensor, k_pages: Tensor, rows: AttentionRows, scale: float, layer: SparseLayer
    ) -> Tensor:
        q, (num_kv, page_size) = q_TQD.contiguous(), k_pages.shape[1:3]
        self._check_rows(rows, q.shape[0], k_pages, None)
        check_choice(rows, num_kv, layer)
        struct = attention_args(q.shape[1], q.shape[2], k_pages, k_pages, rows, scale, None, q.dtype, layer)
        struct.q = q.data_ptr()
        self._lib.braid_choose_keys(self._pool, byref(struct))
        return of_whole_pages(chosen_places(rows, num_kv, page_size), num_kv, page_size)

    def copy_keys(self, source: Pages, target: Pages, places_M: Tensor) -> None:
        slots = slots_of(places_M, *source[0].shape[1:3])
        self._lib.braid_move_kv(byref(move_args(source, target, slots, slots, None)))

    def kv_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        return (dtype,)

    def allocate_kv(
        self, num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Tensors of shape [P, K, S, D] over memory laid out as layer.h's KvLayout says, padded to whole tiles.

        Shape and dtype may be read and the whole may be filled; single elements mean nothing outside the kernels.
        """
        if dtype not in (torch.bfloat16, torch.float32) or device.type != "cpu":
            raise ValueError(f"KV of {dtype} on {device}; the CPU kernels hold bfloat16 and float32 on the CPU")
        k_pages, v_pages = page_memory(num_pages, page_size, num_kv, head_dim, dtype)
        for pages in (k_pages, v_pages):
            self._lib.braid_prefer_huge_pages(pages.data_ptr(), pages.nbytes)
        return trim(k_pages, page_size, head_dim), trim(v_pages, page_size, head_dim)

    def allocate_sparse(
        self, k_pages: Tensor, roles: Roles, has_bounds: bool, channels_KC: Tensor | None, int4_labels: bool = False
    ) -> SparseLayer:
        return allocate(k_pages, roles, has_bounds, channels_KC, int4_labels)

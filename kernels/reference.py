"""Every operation of `Ops` in plain torch: the oracle of the compiled back ends, and what runs where none can.

Right first, then reasonable: no Python loop over tokens or heads, none over layers, one over groups of equal spans.
Any device, float32, bfloat16 or float16. Legend of shapes in ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import sparse_reference
from kernels.blocks import (
    PLAIN,
    AttentionBlock,
    AttentionForm,
    DenseLayers,
    check_sparse,
    composed_attention_block,
    composed_dense_layers,
)
from kernels.edits import Edits, edit_logits
from kernels.hosted import Pages
from kernels.kv_format import check_scale, page_shape, split_record, stored_dtypes, write_slots
from kernels.ops import AttentionRows, PackedLinear, RowStatistics
from kernels.prefill_rows import attend_in_parts
from kernels.prefill_torch import PlainLayout, attend_part
from kernels.reference_attention import attend
from kernels.routing import Router, choose_experts
from kernels.sparse import Roles, SparseLayer
from kernels.truncation import Filters, truncate

LOGITS_TILE = 8192
"""Rows of a low-precision head that are widened to float32 at a time."""
INT4_GROUP = 32
"""Input features that share one int4 scale."""

_WORD = 0xFFFFFFFF


def fake_quantize(weight_NK: Tensor, quantization: str) -> Tensor:
    """Round a weight to what int8 or int4 storage would give back, in the weight's dtype.

    int8  symmetric, one scale per output row: max|w| / 127
    int4  symmetric, one scale per output row and `INT4_GROUP` inputs: max|w| / 7; a shorter last group has its own
    """
    weight = weight_NK.float()
    if quantization == "int8":
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-12)
        return ((weight / scale).round().clamp(-127, 127) * scale).to(weight_NK.dtype)
    if quantization != "int4":
        raise ValueError(f"quantization is {quantization!r}; supported are 'int8' and 'int4'")
    num_in = weight.shape[1]
    padded = F.pad(weight, (0, -num_in % INT4_GROUP)).view(weight.shape[0], -1, INT4_GROUP)
    scale = (padded.abs().amax(dim=2, keepdim=True) / 7).clamp_min(1e-12)
    rounded = ((padded / scale).round().clamp(-7, 7) * scale).flatten(1)
    return rounded[:, :num_in].to(weight_NK.dtype)


@dataclass(frozen=True)
class DenseLinear:
    """The reference back end's packed weight: the weight itself."""

    weight_NK: Tensor
    bias_N: Tensor | None

    @property
    def out_features(self) -> int:
        return int(self.weight_NK.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight_NK.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.weight_NK.nbytes + (0 if self.bias_N is None else self.bias_N.nbytes)


def dense_weight(weight: PackedLinear) -> DenseLinear:
    """The weight, if this back end (or one that multiplies with torch) packed it; TypeError otherwise."""
    if not isinstance(weight, DenseLinear):
        raise TypeError(f"this weight was packed by another back end ({type(weight).__name__})")
    return weight


class ReferenceOps:
    """`Ops` in plain torch.

    quantization  None, "int8" or "int4": weights are rounded to that grid when packed and kept in the model's dtype,
                  so the text is what a quantised back end gives but no memory is saved
    """

    def __init__(self, quantization: str | None = None) -> None:
        if quantization not in (None, "int8", "int4"):
            raise ValueError(f"quantization is {quantization!r}; supported are 'int8' and 'int4'")
        self.quantization = quantization
        self.owns_threads = False
        self.name = "reference" if quantization is None else f"reference-{quantization}"

    def pack_linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> DenseLinear:
        if self.quantization is not None:
            weight_NK = fake_quantize(weight_NK, self.quantization)
        return DenseLinear(weight_NK.contiguous(), bias_N)

    def pack_experts(self, num_experts: int, weight_of: Callable[[int], Tensor]) -> list[DenseLinear]:
        return [self.pack_linear(weight_of(expert)) for expert in range(num_experts)]

    def linear(self, x_TK: Tensor, weight: PackedLinear, residual_TN: Tensor | None = None) -> Tensor:
        dense = dense_weight(weight)
        y_TN = F.linear(x_TK, dense.weight_NK, dense.bias_N)
        return y_TN if residual_TN is None else y_TN + residual_TN

    def logits(self, x_JK: Tensor, weight: PackedLinear) -> Tensor:
        dense = dense_weight(weight)
        x_JK = x_JK.float()
        tiles = [F.linear(x_JK, tile.float()) for tile in torch.split(dense.weight_NK, LOGITS_TILE)]
        logits_JV = torch.cat(tiles, dim=1)
        return logits_JV if dense.bias_N is None else logits_JV + dense.bias_N.float()

    def embed(self, table_VH: Tensor, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, table_VH)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x = x_TH.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_H.float()).to(x_TH.dtype)

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
        heads = qkv_TX.view(qkv_TX.shape[0], num_q + 2 * num_kv, head_dim)
        q, k, v = torch.split(heads, [num_q, num_kv, num_kv], dim=1)
        if q_norm_D is not None:
            q = self.rms_norm(q, q_norm_D, eps)
        if k_norm_D is not None:
            k = self.rms_norm(k, k_norm_D, eps)
        cos_sin = cos_sin_MR[rows.positions.long()].unsqueeze(1)
        check_scale(k_pages, kv_scale_2K)
        k_scale_K, v_scale_K = (None, None) if kv_scale_2K is None else kv_scale_2K
        write_slots(k_pages, rows.slots, rotate(k, cos_sin), k_scale_K)
        write_slots(v_pages, rows.slots, v, v_scale_K)
        if layer is not None:
            sparse_reference.write(layer, k_pages, rows.slots)
        return rotate(q, cos_sin)

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
                q_TQD, rows.prefill, window,
                lambda others: self.paged_attention(q_TQD, k_pages, v_pages, others, scale, layer=layer),
                lambda part, q: attend_part(
                    PlainLayout(), lambda q, k, v, lists: attend(q, k, v, lists, scale, None, PLAIN, None),
                    q, k_pages, v_pages, rows.page_table[part.sequence], part, scale,
                ),
            )  # fmt: skip
        out_TQD = attend(q_TQD, k_pages, v_pages, rows, scale, window, form, kv_scale_2K)
        if rows.sparse is not None and layer is not None:
            check_sparse(form, k_pages, q_TQD)
            sparse_reference.attend(out_TQD, q_TQD, k_pages, v_pages, rows, scale, rows.sparse, layer)
        return out_TQD

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor:
        return composed_attention_block(self, x_TH, block, k_pages, v_pages, rows)

    def dense_layers(
        self, x_TH: Tensor, run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], rows: AttentionRows
    ) -> Tensor:
        return composed_dense_layers(self, x_TH, run, kv, rows)

    def silu_mul(self, gate_up_TX: Tensor) -> Tensor:
        gate, up = gate_up_TX.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up_TX.dtype)

    def moe(
        self,
        x_TH: Tensor,
        router_logits_TE: Tensor,
        router: Router,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
    ) -> Tensor:
        weights_Tk, experts_Tk = choose_experts(router_logits_TE, router)
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        for expert in sorted(set(experts_Tk.flatten().tolist())):
            token, choice = (experts_Tk == expert).nonzero(as_tuple=True)
            y = self.linear(self.silu_mul(self.linear(x_TH[token], gate_up[expert])), down[expert])
            out_TH.index_add_(0, token, y.float() * weights_Tk[token, choice].unsqueeze(1))
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
        noisy = (~greedy_J).nonzero().squeeze(1)
        if noisy.numel() == 0:
            return logits_JV.argmax(dim=-1)
        noise = gumbel_noise(
            logits_JV.shape[1], seeds_J[noisy], sample_index_J[noisy], positions_J[noisy], stream=stream
        )
        return logits_JV.index_add(0, noisy, noise).argmax(dim=-1)

    def row_statistics(self, logits_JV: Tensor, ids_J: Tensor) -> RowStatistics:
        # Sums in float64, so that the order in which a machine adds does not show.
        logits = logits_JV.double()
        log_probs = torch.log_softmax(logits, dim=-1)
        best, best_id = logits.max(dim=-1)
        second = logits.scatter(1, best_id[:, None], float("-inf")).amax(dim=-1)
        entropy = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
        logit = logits.gather(1, ids_J[:, None])[:, 0]
        found = (best, second, logits.logsumexp(-1), entropy, logit)
        return RowStatistics(best_id, *(values.float() for values in found))

    def move_kv(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        from_slots_M: Tensor,
        to_slots_M: Tensor,
        layer: SparseLayer | None = None,
    ) -> None:
        page_size = k_pages.shape[2]
        parts: list[Tensor] = [k_pages, v_pages]
        if k_pages.dtype == torch.int8:
            parts = [part for pages in parts for part in split_record(pages)]
        for source, target in zip(from_slots_M.tolist(), to_slots_M.tolist(), strict=True):
            for part in parts:
                part[target // page_size, :, target % page_size] = part[source // page_size, :, source % page_size]
        if layer is not None:
            sparse_reference.write(layer, k_pages, to_slots_M)

    def choose_keys(
        self, q_TQD: Tensor, k_pages: Tensor, rows: AttentionRows, scale: float, layer: SparseLayer
    ) -> Tensor:
        return sparse_reference.choose(q_TQD, k_pages, rows, layer)

    def copy_keys(self, source: Pages, target: Pages, places_M: Tensor) -> None:
        for pages, others in zip(source, target, strict=True):
            others.view(-1, others.shape[3])[places_M] = pages.view(-1, pages.shape[3])[places_M]

    def kv_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        return stored_dtypes(dtype)

    def allocate_kv(
        self, num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        shape = page_shape(num_pages, page_size, num_kv, head_dim, dtype)
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)

    def allocate_sparse(
        self,
        k_pages: Tensor,
        roles: Roles,
        has_bounds: bool,
        channels_KC: Tensor | None,
        int4_labels: bool = False,
    ) -> SparseLayer:
        return sparse_reference.allocate(k_pages, roles, has_bounds, channels_KC, int4_labels)


def rotate(x_ThD: Tensor, cos_sin_T1R: Tensor) -> Tensor:
    """Turn the first R elements of each head by the row's angles, element i with element i + R/2; keeps x's dtype."""
    rotary_dim = cos_sin_T1R.shape[-1]
    cos, sin = cos_sin_T1R.chunk(2, dim=-1)
    first, second = x_ThD[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_ThD.dtype)
    return turned if rotary_dim == x_ThD.shape[-1] else torch.cat((turned, x_ThD[..., rotary_dim:]), dim=-1)


def gumbel_noise(
    vocab_size: int, seeds_J: Tensor, sample_index_J: Tensor, positions_J: Tensor, *, stream: int = 0
) -> Tensor:
    """Standard Gumbel noise, float32 [J, V], as `Ops.sample` defines it; the logarithms are taken in float64."""
    quads = torch.arange(-(-vocab_size // 4), device=seeds_J.device).expand(seeds_J.shape[0], -1)  # [J, V/4]
    position, sample_index = (positions_J & _WORD).unsqueeze(1), (sample_index_J & _WORD).unsqueeze(1)
    key = ((seeds_J & _WORD).unsqueeze(1), ((seeds_J >> 32) & _WORD).unsqueeze(1))
    words = philox((quads, position, sample_index, torch.full_like(position, stream)), key)
    random = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    uniform = ((random >> 9).double() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform)).float()


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counter words and two key words, each a 32-bit value in int64, to four random words.

    Source: Salmon et al. (2011), section 3.3 and table 2 (multipliers, Weyl constants).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product may wrap into the sign bit; the mask after the shift makes the high word right again.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3

"""The one seam between the models and the machine: every tensor operation a model's forward needs.

A back end implements `Ops`; `kernels/reference.py` is the plain-torch one and the oracle of all others. A model calls
nothing but `Ops` on the hot path, so that a new back end touches no model and a new model touches no back end.

Legend of shapes: T rows of the step, H hidden, Q query heads, K kv heads, D head_dim, R rotary dim, M table positions,
P pages, S page_size, N sequences (or out features of a weight), I intermediate size, E experts, J judged rows, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers
from kernels.routing import Router
from kernels.sparse import Role, SparseLayer, SparseRows


@dataclass(frozen=True)
class AttentionRows:
    """Where the rows of one step live in the paged KV cache; built once per step, the same for all layers.

    page_table   int32 [N, max_pages]; entries past a sequence's last page are never read
    row_seq      int32 [T], the row of page_table that belongs to each query row
    positions    int32 [T], the row's RoPE position; it is the row's KV index but in trees and for shadow rows
    visible      int32 [T], >= 1: the row sees keys [low, visible), low = max(0, position - window + 1), or 0 without
                 a window
    slots        int64 [T], page_id * page_size + offset: where the row's K and V are written
    span_starts  int32 [spans + 1], ascending from 0 to T: rows of one span are contiguous and of one sequence
    tree         int64 [T], or None in a step without trees and shadows. Not 0: the row is of a tree whose keys lie at
                 tree_start, tree_start + 1, ..., parents before children. It sees the keys before tree_start and key
                 tree_start + i if bit i is set: its ancestors and itself (a shadow row: its block without one key,
                 and itself). Its `visible` says nothing. With a window
                 it sees the keys before tree_start from `low` on and its last `window` bits (the n-th bit of a path
                 stands at position tree_start + n)
    tree_starts  int32 [T], there if `tree` is; read where tree is not 0
    sparse       there in a step with rows that read only some of the keys they see
    layers       there where the KV memory has metadata for such rows: of each layer of the model, by its index
    """

    page_table: Tensor
    row_seq: Tensor
    positions: Tensor
    visible: Tensor
    slots: Tensor
    span_starts: Tensor
    tree: Tensor | None = None
    tree_starts: Tensor | None = None
    sparse: SparseRows | None = None
    layers: Sequence[SparseLayer] | None = None


class PackedLinear(Protocol):
    """A weight in the back end's own layout. `num_bytes` is the memory it really holds, bias included."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Ops(Protocol):
    """What a back end offers. Activations, norms and KV pages are of the model's dtype; sums are float32."""

    name: str
    owns_threads: bool
    """It computes on threads of its own: torch's then stay at one, or theirs spin on the cores its steps need."""

    def pack_linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> PackedLinear:
        """Take over a weight [out, in] and its bias [out]; the caller drops its own copy afterwards.

        Projections of one input are concatenated along `out` by the caller (q, k, v; gate, up). Weight-only
        quantisation is a property of the back end, not of this call.
        """
        ...

    def linear(self, x_TK: Tensor, weight: PackedLinear, residual_TN: Tensor | None = None) -> Tensor:
        """x W^T (+ bias) (+ residual) as [T, N] in x's dtype."""
        ...

    def logits(self, x_JK: Tensor, weight: PackedLinear) -> Tensor:
        """x W^T as float32 [J, V], not rounded to x's dtype on the way."""
        ...

    def embed(self, table_VH: Tensor, ids_T: Tensor) -> Tensor:
        """Rows `ids_T` (int64) of the table, [T, H]."""
        ...

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""
        ...

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
        layer: SparseLayer | None = None,
    ) -> Tensor:
        """Split, normalise, rotate, store: returns the rotated q [T, Q, D]; k and v are in the pages afterwards.

        qkv_TX      X = (Q + 2 K) * D, ordered q | k | v, each head by head
        cos_sin_MR  float32, row = position: R/2 cosines, then R/2 sines; R <= D, elements past R are not rotated.
                    Halves convention: element i turns with element i + R/2
        q_norm_D, k_norm_D  per-head RMSNorm weights applied before the rotation (Qwen3), or None
        layer       whose metadata of the new keys is written, too
        """
        ...

    def paged_attention(
        self,
        q_TQD: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: AttentionRows,
        scale: float,
        window: int | None = None,
        layer: SparseLayer | None = None,
    ) -> Tensor:
        """softmax(scale q k^T) v over the keys that each row sees of its own sequence; [T, Q, D] in q's dtype.

        Query head h reads kv head h // (Q / K). Memory past a sequence's last key may hold anything, NaN included.
        layer  what it does for the sparse rows of a step that has some (kernels/sparse.py); they read fewer keys
        """
        ...

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor:
        """The attention half of a layer in one call, [T, H] -> [T, H]: `blocks.composed_attention_block` defines it."""
        ...

    def dense_layers(
        self, x_TH: Tensor, run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], rows: AttentionRows
    ) -> Tensor:
        """Whole layers in one call, [T, H] -> [T, H]: `blocks.composed_dense_layers` defines it.

        kv  (k_pages, v_pages) of each layer of the run
        """
        ...

    def silu_mul(self, gate_up_TX: Tensor) -> Tensor:
        """silu(first half of the row) * second half: [T, 2 I] -> [T, I]."""
        ...

    def moe(
        self,
        x_TH: Tensor,
        router_logits_TE: Tensor,
        router: Router,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
    ) -> Tensor:
        """Sum over the row's chosen experts of weight * down(silu_mul(gate_up(x))), [T, H].

        Choice and weights are those of `routing.choose_experts`.
        """
        ...

    def sample(
        self,
        logits_JV: Tensor,
        seeds_J: Tensor,
        sample_index_J: Tensor,
        positions_J: Tensor,
        greedy_J: Tensor,
        stream: int = 0,
    ) -> Tensor:
        """argmax_v(logit + Gumbel noise) as int64 [J]; rows with `greedy` set take no noise; ties go to the lowest id.

        logits_JV  float32, processed and divided by the temperature; -inf = banned
        seeds_J, sample_index_J, positions_J  int64; positions count the sequence's output tokens
        greedy_J   bool
        stream     0 <= stream < 2^32: draws of different streams are independent
        The noise of token v is Philox4x32-10 with key (seed's low, high 32 bits) and counter
        (v // 4, position, sample index, stream), word v % 4; u = ((word >> 9) + 0.5) * 2^-23; G = -log(-log(u)).
        So it depends on (seed, sample index, position, stream, token) alone (R5). `kernels.philox` is its host twin.
        Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); Gumbel-max: Gumbel (1954).
        """
        ...

    def move_kv(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        from_slots_M: Tensor,
        to_slots_M: Tensor,
        layer: SparseLayer | None = None,
    ) -> None:
        """Copy one layer's K and V of single slots, one after the other in the order of the lists (int64 [M]).

        A slot that is both a source and a destination is read as the earlier copies left it: a path that moves towards
        the front of its own sequence, in ascending order, arrives whole. `layer`: its metadata moves along.
        """
        ...

    def allocate_kv(
        self, num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """One layer's k_pages and v_pages, each [P, K, S, D] and not initialised.

        A back end may choose another layout and documents it; nobody but its own methods may look inside.
        """
        ...

    def allocate_sparse(
        self, k_pages: Tensor, roles: tuple[Role, Role, Role], has_bounds: bool, channels_KC: Tensor | None
    ) -> SparseLayer:
        """Metadata memory beside the k_pages that `allocate_kv` made, not initialised; opaque in the same way.

        has_bounds   for `Method.QUEST`; channels_KC (int32, elements of a key) for `Method.DOUBLE_SPARSITY`
        Raises ValueError if this back end has no sparse attention.
        """
        ...

"""The one seam between the models and the machine: every tensor operation a model's forward needs.

A back end implements `Ops`; `kernels/reference.py` is the plain-torch one and the oracle of all others. A model calls
nothing but `Ops` on the hot path, so that a new back end touches no model and a new model touches no back end.

Legend of shapes: T rows of the step, H hidden, Q query heads, K kv heads, D head_dim, R rotary dim, M table positions,
P pages, S page_size, N sequences (or out features of a weight), I intermediate size, E experts, J judged rows, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.blocks import PLAIN, AttentionBlock, AttentionForm, DenseLayers
from kernels.edits import Edits
from kernels.prefill_rows import PrefillRows
from kernels.routing import Router
from kernels.sparse import Roles, SparseLayer, SparseRows
from kernels.truncation import Filters


@dataclass(frozen=True)
class StepRows:
    """The fields of `AttentionRows` that a plan of attention needs, on the host; meaning and types as there."""

    row_seq: NDArray[np.int32]
    positions: NDArray[np.int32]
    visible: NDArray[np.int32]
    span_starts: NDArray[np.int32]
    tree: NDArray[np.int64] | None = None
    tree_starts: NDArray[np.int32] | None = None
    page_table: NDArray[np.int32] | None = None
    """Without it a plan that looks for shared prefixes reads the device's."""


@dataclass(frozen=True)
class AttentionRows:
    """Where the rows of one step live in the paged KV cache; built once per step, the same for all layers.

    page_table   int32 [N, max_pages]; entries past a sequence's last page are never read
    row_seq      int32 [T], the row of page_table that belongs to each query row
    positions    int32 [T], the row's RoPE position; it is the row's KV index but in trees and for shadow rows
    visible      int32 [T], >= 0: the row sees keys [low, visible), low = max(0, position - window + 1), or 0 without
                 a window. 0: it fills a captured step up, sees nothing, and its attention is 0
    slots        int64 [T], page_id * page_size + offset: where the row's K and V are written
    span_starts  int32 [spans + 1], ascending from 0 to T: rows of one span are contiguous and of one sequence
    tree         int64 [T], or None in a step without trees and shadows. Not 0: the row is of a tree whose keys lie at
                 tree_start, tree_start + 1, ..., parents before children. It sees the keys before tree_start and key
                 tree_start + i if bit i is set: its ancestors and itself (a shadow row: its block without one key,
                 and itself). Its `visible` says nothing. With a window
                 it sees the keys before tree_start from `low` on and its last `window` bits (the n-th bit of a path
                 stands at position tree_start + n)
    tree_starts  int32 [T], there if `tree` is; read where tree is not 0
    host         the same rows on the host, where who made them has them: a back end that plans need not read them back
    sparse       there in a step with rows that read only some of the keys they see
    layers       there where the KV memory has metadata for such rows: of each layer of the model, by its index
    prefill      there in a step with regions of block-sparse prompts (kernels/prefill_rows.py)
    """

    page_table: Tensor
    row_seq: Tensor
    positions: Tensor
    visible: Tensor
    slots: Tensor
    span_starts: Tensor
    tree: Tensor | None = None
    tree_starts: Tensor | None = None
    host: StepRows | None = None
    sparse: SparseRows | None = None
    layers: Sequence[SparseLayer] | None = None
    prefill: PrefillRows | None = None


@dataclass(frozen=True)
class RowStatistics:
    """What `Ops.row_statistics` finds, each [J]: float32, `best_id` int64."""

    best_id: Tensor
    best: Tensor
    second: Tensor
    lse: Tensor
    entropy: Tensor
    logit: Tensor


class PackedLinear(Protocol):
    """A weight in the back end's own layout. `num_bytes` is the memory it really holds, bias included."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Ops(Protocol):
    """What a back end offers. Activations and norms are of the model's dtype, KV pages of one of `kv_dtypes`; sums are
    float32."""

    name: str
    owns_threads: bool
    """It computes on threads of its own: torch's then stay at one, or theirs spin on the cores its steps need."""

    def pack_linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> PackedLinear:
        """Take over a weight [out, in] and its bias [out]; the caller drops its own copy afterwards.

        Projections of one input are concatenated along `out` by the caller (q, k, v; gate, up). Weight-only
        quantisation is a property of the back end, not of this call.
        """
        ...

    def pack_experts(self, num_experts: int, weight_of: Callable[[int], Tensor]) -> Sequence[PackedLinear]:
        """Take over one projection [N, K] of every expert, without biases, for `moe`.

        weight_of  gives expert e's weight and is asked in order, once each; one of them is in memory at a time
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
        kv_scale_2K: Tensor | None = None,
        layer: SparseLayer | None = None,
    ) -> Tensor:
        """Split, normalise, rotate, store: returns the rotated q [T, Q, D]; k and v are in the pages afterwards.

        qkv_TX      X = (Q + 2 K) * D, ordered q | k | v, each head by head
        cos_sin_MR  float32, row = position: R/2 cosines, then R/2 sines; R <= D, elements past R are not rotated.
                    Halves convention: element i turns with element i + R/2
        q_norm_D, k_norm_D  per-head RMSNorm weights applied before the rotation (Qwen3), or None
        kv_scale_2K  float32, of fp8 pages: what a stored key (row 0) or value (row 1) of a kv head is multiplied by;
                     None = 1.0, uncalibrated. Other pages take none: int8 pages hold a scale for each token and head
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
        form: AttentionForm = PLAIN,
        kv_scale_2K: Tensor | None = None,
        layer: SparseLayer | None = None,
    ) -> Tensor:
        """softmax(scale q k^T) v over the keys that each row sees of its own sequence; [T, Q, D] in q's dtype.

        Query head h reads kv head h // (Q / K). Memory past a sequence's last key may hold anything, NaN included.
        form         a back end that has no such attention raises ValueError
        kv_scale_2K  as in `qkv_rope_write`
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

        Choice and weights are those of `routing.choose_experts`; gate_up [2 I, H] and down [H, I] of `pack_experts`.
        """
        ...

    def edit_logits(self, logits_JV: Tensor, edits: Edits) -> None:
        """Bias, penalties, bans, masks and temperature in place, float32 and contiguous: `kernels.edits` defines it."""
        ...

    def truncate(self, logits_JV: Tensor, filters: Filters) -> None:
        """Ban in place (-inf) what min_p, then top_k, then top_p cut off: `truncation.truncate` defines it.

        logits_JV  float32, divided by the temperature, contiguous; each row holds a finite value, none is NaN or +inf
        min_p      tokens less likely than min_p x the likeliest go
        top_k      the k best stay, and what equals the k-th
        top_p      the fewest best stay whose share of what is left reaches p, at least one; of equal tokens at the edge
                   the lowest ids
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

    def row_statistics(self, logits_JV: Tensor, ids_J: Tensor) -> RowStatistics:
        """Of each row of logits, float32: the best id (the lowest of equals), the two greatest logits, log-sum-exp,
        entropy in nats, the logit of its id in `ids_J` (int64).

        -inf marks banned ids; at least one id of each row must be allowed. The second is -inf where only one id is.
        The probability of an id is exp(logit - lse).
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

        Scales that lie in the pages move along.

        A slot that is both a source and a destination is read as the earlier copies left it: a path that moves towards
        the front of its own sequence, in ascending order, arrives whole. `layer`: its metadata moves along.
        """
        ...

    def kv_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """What KV pages of a model of `dtype` can be here, `dtype` first; int8 and float8_e4m3fn are lossy."""
        ...

    def allocate_kv(
        self, num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """One layer's k_pages and v_pages, each [P, K, S, D] of `dtype` and not initialised.

        int8 pages are [P, K, S, D + 4] bytes, scales included (kernels/kv_format.py).
        A back end may choose another layout and documents it; nobody but its own methods may look inside.
        """
        ...

    def allocate_sparse(
        self,
        k_pages: Tensor,
        roles: Roles,
        has_bounds: bool,
        channels_KC: Tensor | None,
        int4_labels: bool = False,
    ) -> SparseLayer:
        """Metadata memory beside the k_pages that `allocate_kv` made, not initialised; opaque in the same way.

        has_bounds   for `Method.QUEST`; channels_KC (int32, elements of a key) for `Method.DOUBLE_SPARSITY`
                     and its pages
        int4_labels  labels are codes of 4 bits with a scale for each key and head (kernels/label_codes.py)
        Raises ValueError if this back end has no sparse attention.
        """
        ...


@runtime_checkable
class FixedPlans(Protocol):
    """What a back end offers besides `Ops` whose forwards may be captured (CUDA graphs) though it plans on the host.

    A captured forward reads its plan from memory that stays; whoever replays it fills that memory anew for each step.
    Forwards are told apart by their `AttentionRows` object, whose plan goes with it.
    """

    def plan_words(self, num_rows: int) -> int:
        """int32 words for the plans of a step of so many rows, any spans, and the kinds of layer run so far."""
        ...

    def fix_plans(self, rows: AttentionRows, words: Tensor) -> None:
        """From now on these rows' attention follows what stands in `words`, int32 on the device, when it runs."""
        ...

    def write_plans(self, host: StepRows, words: NDArray[np.int32]) -> None:
        """Plan a step into `words`, on the host; they are then copied to what `fix_plans` was given for its size.

        The step has that size's rows: padding rows are spans of their own, with `visible` 0.
        """
        ...

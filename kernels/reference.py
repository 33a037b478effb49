"""Every operation of `Ops` in plain torch: the oracle of the compiled back ends, and what runs where none can.

Right first, then reasonable: no Python loop over tokens or heads, none over layers, one over groups of equal spans.
Any device, float32, bfloat16 or float16. Legend of shapes in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import sparse_reference
from kernels.blocks import AttentionBlock, DenseLayers, composed_attention_block, composed_dense_layers
from kernels.ops import AttentionRows, PackedLinear
from kernels.routing import Router, choose_experts
from kernels.sparse import Role, SparseLayer

TILE_ROWS = 256
"""Longer spans are attended in tiles of this many rows, which bounds the score matrix."""
MAX_SCORES = 1 << 24
"""Most attention scores (rows x query heads x keys) held at once."""
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
        layer: SparseLayer | None = None,
    ) -> Tensor:
        heads = qkv_TX.view(qkv_TX.shape[0], num_q + 2 * num_kv, head_dim)
        q, k, v = torch.split(heads, [num_q, num_kv, num_kv], dim=1)
        if q_norm_D is not None:
            q = self.rms_norm(q, q_norm_D, eps)
        if k_norm_D is not None:
            k = self.rms_norm(k, k_norm_D, eps)
        cos_sin = cos_sin_MR[rows.positions.long()].unsqueeze(1)
        page_size = k_pages.shape[2]
        pages, offsets = rows.slots // page_size, rows.slots % page_size
        k_pages[pages, :, offsets] = rotate(k, cos_sin)
        v_pages[pages, :, offsets] = v
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
        layer: SparseLayer | None = None,
    ) -> Tensor:
        out_TQD = torch.empty_like(q_TQD)
        for tiles in _equal_tiles(rows.span_starts, q_TQD.shape[1], k_pages.shape[2] * rows.page_table.shape[1]):
            out_TQD[tiles] = _attend(q_TQD, k_pages, v_pages, rows, tiles, scale, window)
        if rows.sparse is not None and layer is not None:
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

    def move_kv(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        from_slots_M: Tensor,
        to_slots_M: Tensor,
        layer: SparseLayer | None = None,
    ) -> None:
        page_size = k_pages.shape[2]
        for source, target in zip(from_slots_M.tolist(), to_slots_M.tolist(), strict=True):
            for pages in (k_pages, v_pages):
                pages[target // page_size, :, target % page_size] = pages[source // page_size, :, source % page_size]
        if layer is not None:
            sparse_reference.write(layer, k_pages, to_slots_M)

    def allocate_kv(
        self, num_pages: int, page_size: int, num_kv: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        shape = (num_pages, num_kv, page_size, head_dim)
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)

    def allocate_sparse(
        self, k_pages: Tensor, roles: tuple[Role, Role, Role], has_bounds: bool, channels_KC: Tensor | None
    ) -> SparseLayer:
        return sparse_reference.allocate(k_pages, roles, has_bounds, channels_KC)


def rotate(x_ThD: Tensor, cos_sin_T1R: Tensor) -> Tensor:
    """Turn the first R elements of each head by the row's angles, element i with element i + R/2; keeps x's dtype."""
    rotary_dim = cos_sin_T1R.shape[-1]
    cos, sin = cos_sin_T1R.chunk(2, dim=-1)
    first, second = x_ThD[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_ThD.dtype)
    return turned if rotary_dim == x_ThD.shape[-1] else torch.cat((turned, x_ThD[..., rotary_dim:]), dim=-1)


def _equal_tiles(span_starts: Tensor, num_heads: int, max_keys: int) -> list[Tensor]:
    """Cut the step's rows into tiles within spans; returns groups of equally long tiles, int64 [tiles, rows]."""
    bounds = span_starts.tolist()
    by_length: dict[int, list[int]] = {}
    for start, end in pairwise(bounds):
        for tile in range(start, end, TILE_ROWS):
            by_length.setdefault(min(TILE_ROWS, end - tile), []).append(tile)
    groups = []
    for length, starts in by_length.items():
        most = max(1, MAX_SCORES // (length * num_heads * max(1, max_keys)))
        rows = torch.tensor(starts, device=span_starts.device).unsqueeze(1)
        rows = rows + torch.arange(length, device=span_starts.device)
        groups += list(torch.split(rows, most))
    return groups


def _attend(
    q_TQD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
    tiles: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of B tiles of R rows, [B, R, Q, D]; keys are gathered per tile and padded to the longest."""
    num_kv, page_size, head_dim = k_pages.shape[1:]
    num_tiles, num_rows = tiles.shape
    visible = rows.visible[tiles]  # [B, R]
    if rows.tree is not None:
        visible = visible.where(rows.tree[tiles] == 0, _tree_ends(rows, tiles))
    num_keys = int(visible.max())
    num_pages = -(-num_keys // page_size)
    index = torch.arange(num_pages * page_size, device=q_TQD.device)
    seen = index < visible.unsqueeze(2)  # [B, R, L]
    if window is not None:
        seen &= index > (rows.positions[tiles] - window).unsqueeze(2)
    if rows.tree is not None:
        seen = _seen_in_trees(rows, tiles, index, window, seen)
    read = seen.any(dim=1)  # [B, L]: the keys this tile reads at all
    table = rows.page_table[rows.row_seq[tiles[:, 0]].long(), :num_pages].long()
    table = table.where(read.view(num_tiles, num_pages, page_size).any(2), 0)

    def gather(pages: Tensor) -> Tensor:
        keys = pages[table].transpose(1, 2).reshape(num_tiles, num_kv, 1, -1, head_dim).float()
        # A weight of zero times NaN is NaN: what is not read must not be there.
        return keys.masked_fill(~read.view(num_tiles, 1, 1, -1, 1), 0.0)

    q = q_TQD[tiles].float().view(num_tiles, num_rows, num_kv, -1, head_dim).permute(0, 2, 3, 1, 4)  # [B, K, G, R, D]
    scores = torch.matmul(q, gather(k_pages).transpose(-1, -2)) * scale
    scores = scores.masked_fill(~seen.view(num_tiles, 1, 1, num_rows, -1), float("-inf"))
    out = torch.matmul(torch.softmax(scores, dim=-1), gather(v_pages))
    return out.permute(0, 3, 1, 2, 4).reshape(num_tiles, num_rows, -1, head_dim).to(q_TQD.dtype)


def _tree_bits(rows: AttentionRows, tiles: Tensor) -> Tensor:
    """The rows' tree masks bit by bit, bool [B, R, 64]."""
    assert rows.tree is not None
    return (rows.tree[tiles].unsqueeze(2) >> torch.arange(64, device=tiles.device)) & 1 != 0


def _tree_ends(rows: AttentionRows, tiles: Tensor) -> Tensor:
    """One more than the last key that each row's mask names, int32 [B, R]; no meaning where the mask is 0."""
    assert rows.tree_starts is not None
    bits = _tree_bits(rows, tiles) * torch.arange(1, 65, dtype=torch.int32, device=tiles.device)
    return rows.tree_starts[tiles] + bits.amax(dim=2)


def _seen_in_trees(rows: AttentionRows, tiles: Tensor, index: Tensor, window: int | None, seen: Tensor) -> Tensor:
    """`seen` [B, R, L], with the rows of draft trees following their masks from the tree's first key on."""
    assert rows.tree is not None
    assert rows.tree_starts is not None
    bits = _tree_bits(rows, tiles)
    if window is not None:
        bits &= bits.flip(2).cumsum(2).flip(2) <= window
    offset = index - rows.tree_starts[tiles].unsqueeze(2)
    inside = bits.gather(2, offset.clamp(0, 63)) & (offset < 64)
    is_tree = (rows.tree[tiles] != 0).unsqueeze(2)
    return seen.where(~is_tree | (offset < 0), inside)


@dataclass(frozen=True)
class RowStatistics:
    """What `row_statistics` finds, each [J]: float32, `best_id` int64."""

    best_id: Tensor
    best: Tensor
    second: Tensor
    lse: Tensor
    entropy: Tensor
    logit: Tensor


def row_statistics(logits_JV: Tensor, ids_J: Tensor) -> RowStatistics:
    """Of each row: the best id (the lowest of equals), two greatest logits, log-sum-exp, entropy in nats, id's logit.

    -inf marks banned ids; at least one id of each row must be allowed. A second best is -inf where only one id is.
    Probability of an id: exp(logit - lse). The triton back end needs no [rows, vocabulary] copy for them.
    """
    logits = logits_JV.float()
    log_probs = torch.log_softmax(logits, dim=-1)
    best, best_id = logits.max(dim=-1)
    second = logits.scatter(1, best_id[:, None], float("-inf")).amax(dim=-1)
    entropy = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
    return RowStatistics(best_id, best, second, logits.logsumexp(-1), entropy, logits.gather(1, ids_J[:, None])[:, 0])


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

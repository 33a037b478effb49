"""The training-time model: a small Qwen3-shaped transformer whose parameters have the Hugging Face names.

One body serves both objectives; only the attention mask differs (`causal_mask`, `noisy_clean_mask`). It keeps no KV
cache and is not what serves requests: `server/models/qwen3.py` loads the exported weights. Legend: B rows of the batch,
L tokens of a row, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.embedded.pairs import VOCAB_SIZE as RETRIEVAL_VOCAB

BLOCK_SIZE = 8
"""Unit of denoising, in tokens; blocks start at multiples of it, counted from the start of the sequence."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model; `head_dim` is even, `num_heads` a multiple of `num_kv_heads`."""

    hidden: int = 256
    num_layers: int = 7
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 768
    vocab_size: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    max_position: int = 2048
    embedding_std: float = 0.02
    """Of the embeddings at the start. Tokens that are told apart by nothing but their embeddings need more of it."""


PRESETS: dict[str, Shape] = {
    "braid-tiny": Shape(),
    "braid-tiny-quick": Shape(hidden=192, num_layers=4, mlp=576),
    "braid-tiny-draft": Shape(hidden=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=48, mlp=288),
    "braid-tiny-bidirectional": Shape(hidden=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=48, mlp=288),
    "braid-tiny-retrieval": Shape(
        hidden=128,
        num_layers=5,
        mlp=256,
        vocab_size=RETRIEVAL_VOCAB,
        rope_theta=1e10,
        max_position=16_384,
        embedding_std=0.05,
    ),
    "test": Shape(hidden=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp=64),
}


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the GPT-NeoX layout: x [B, heads, L, D], cos and sin [B, 1, L, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a norm per query and key head (Qwen3)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def queries_and_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised and rotated: [B, heads, L, D] and [B, kv heads, L, D]."""
        heads = (*x.shape[:2], -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        return q, k

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k = self.queries_and_keys(x, cos, sin)
        v = self.v_proj(x).view(rows, length, -1, self.shape.head_dim).transpose(1, 2)
        group = self.shape.num_heads // self.shape.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return projected


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Layer(nn.Module):
    """Pre-norm residual layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class TinyModel(nn.Module):
    """Token ids to hidden states; `logits` applies the tied head, so that only the rows with a loss pay for it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        self.apply(self._initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # residual branches start small: GPT-2's scaling
                nn.init.normal_(parameter, std=0.02 / (2 * shape.num_layers) ** 0.5)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.shape.embedding_std)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions int64 [B, L], each [B, 1, L, D / 2]."""
        wide = torch.float64 if self.embed_tokens.weight.dtype == torch.float64 else torch.float32
        half = torch.arange(0, self.shape.head_dim, 2, device=positions.device, dtype=wide) / self.shape.head_dim
        angles = positions[:, None, :, None].to(wide) * (self.shape.rope_theta**-half)
        return angles.cos(), angles.sin()

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """ids and positions int64 [B, L]; mask bool [B, 1, L, L], True where the row may look. Returns [B, L, H]."""
        cos, sin = self.rotary(positions)
        x = F.embedding(ids, self.embed_tokens.weight)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., V]."""
        return F.linear(hidden, self.embed_tokens.weight)


def causal_mask(docs: Tensor, positions: Tensor) -> Tensor:
    """Each token sees its own document up to itself: docs and positions int64 [B, L] -> bool [B, 1, L, L]."""
    same = docs[:, :, None] == docs[:, None, :]
    return (same & (positions[:, :, None] >= positions[:, None, :]))[:, None]


def block_causal_mask(docs: Tensor, positions: Tensor) -> Tensor:
    """Each token sees its own document up to the end of its block."""
    return causal_mask(docs, positions // BLOCK_SIZE)


def noisy_clean_mask(docs: Tensor, positions: Tensor) -> Tensor:
    """The mask of 2 L rows, noisy copy first, clean copy second (block diffusion's training mask): bool [B, 1, 2L, 2L].

    A noisy row sees the noisy rows of its own block and the clean rows of earlier blocks; a clean row sees the clean
    rows up to the end of its own block and never a noisy one. Nothing crosses documents.
    """
    block = positions // BLOCK_SIZE
    same = docs[:, :, None] == docs[:, None, :]
    query, key = block[:, :, None], block[:, None, :]
    top = torch.cat((same & (query == key), same & (key < query)), dim=2)
    bottom = torch.cat((torch.zeros_like(same), same & (key <= query)), dim=2)
    return torch.cat((top, bottom), dim=1)[:, None]

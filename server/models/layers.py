"""The decoder that the served families share: attention over pages, gated or sparse MLP, residual stream.

Plain objects over `Ops`, no nn.Module: a layer runs 12 to 80 times a step, so its methods are bound once and it does
nothing but call them. What makes a family differ (biases, QK norm, windows, experts) is data in ModelConfig.

Legend of shapes: T rows of the step, H hidden, X concatenated q|k|v, J judged rows, V vocab, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Protocol

from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers, MlpBlock
from kernels.ops import AttentionRows, Ops
from kernels.routing import Router
from server.models.config import ModelConfig
from server.models.packing import Packer, Weights

FLOAT32 = ".expert_bias"
"""End of the names of tensors that stay float32 in every model: rounding a router's bias would choose other experts."""


def weight_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor the model needs; the names are Llama's, `checkpoint.file_names` has the file's."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        sizes = (q_size + 2 * kv_size,) if config.fused_qkv else (q_size, kv_size, kv_size)
        for name, size in zip(_qkv_names(config), sizes, strict=True):
            yield from _linear_shapes(f"{layer}.self_attn.{name}", size, hidden, config.qkv_bias)
        yield from _linear_shapes(f"{layer}.self_attn.o_proj", hidden, q_size, config.output_bias)
        if config.qk_norm:
            yield f"{layer}.self_attn.q_norm.weight", (head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (head_dim,)
        yield from _mlp_shapes(config, index)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _qkv_names(config: ModelConfig) -> tuple[str, ...]:
    return ("qkv_proj",) if config.fused_qkv else ("q_proj", "k_proj", "v_proj")


def _linear_shapes(name: str, num_out: int, num_in: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (num_out, num_in)
    if bias:
        yield f"{name}.bias", (num_out,)


def _mlp_shapes(config: ModelConfig, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    name, moe = f"model.layers.{index}.mlp", config.moe
    if moe is None or index not in moe.sparse_layers:
        yield from _gated_shapes(name, config.hidden_size, config.intermediate_size, config.mlp_bias)
        return
    yield f"{name}.gate.weight", (moe.num_experts, config.hidden_size)
    if moe.is_sigmoid:
        yield f"{name}.gate.expert_bias", (moe.num_experts,)
    for expert in range(moe.num_experts):
        yield from _gated_shapes(f"{name}.experts.{expert}", config.hidden_size, moe.intermediate_size)
    if moe.shared_size:
        yield from _gated_shapes(f"{name}.shared_experts", config.hidden_size, moe.shared_size)


def _gated_shapes(name: str, hidden: int, size: int, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear_shapes(f"{name}.gate_proj", size, hidden, bias)
    yield from _linear_shapes(f"{name}.up_proj", size, hidden, bias)
    yield from _linear_shapes(f"{name}.down_proj", hidden, size, bias)


def attention_block(config: ModelConfig, index: int, packer: Packer, cos_sin_MR: Tensor) -> AttentionBlock:
    """The weights of a layer's attention half."""
    layer = f"model.layers.{index}"
    return AttentionBlock(
        norm_H=packer.tensor(f"{layer}.input_layernorm.weight"),
        qkv=packer.linear(f"{layer}.self_attn", _qkv_names(config), config.qkv_bias),
        out=packer.linear(f"{layer}.self_attn", ("o_proj",), config.output_bias),
        q_norm_D=packer.tensor(f"{layer}.self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm_D=packer.tensor(f"{layer}.self_attn.k_norm.weight") if config.qk_norm else None,
        num_q=config.num_heads,
        num_kv=config.num_kv_heads,
        head_dim=config.head_dim,
        cos_sin_MR=cos_sin_MR,
        eps=config.rms_norm_eps,
        scale=config.head_dim**-0.5,
        window=config.windows[index],
        layer=index,
    )


def mlp_block(config: ModelConfig, index: int, packer: Packer) -> MlpBlock:
    """The weights of a layer's gated MLP."""
    layer = f"model.layers.{index}"
    return MlpBlock(
        norm_H=packer.tensor(f"{layer}.post_attention_layernorm.weight"),
        gate_up=packer.linear(f"{layer}.mlp", ("gate_proj", "up_proj"), config.mlp_bias),
        down=packer.linear(f"{layer}.mlp", ("down_proj",), config.mlp_bias),
        eps=config.rms_norm_eps,
    )


class SparseMlp:
    """x + a router's weighted sum of its experts of norm(x) (+ a shared expert). Router logits are float32."""

    def __init__(self, config: ModelConfig, index: int, packer: Packer, ops: Ops) -> None:
        moe = config.moe
        assert moe is not None
        layer = f"model.layers.{index}"
        self._norm_H = packer.tensor(f"{layer}.post_attention_layernorm.weight")
        self._gate = packer.linear(f"{layer}.mlp", ("gate",))
        bias_E = packer.tensor(f"{layer}.mlp.gate.expert_bias") if moe.is_sigmoid else None
        self._router = Router(
            moe.top_k, moe.norm_topk_prob, moe.is_sigmoid, bias_E, moe.num_groups, moe.top_groups, moe.scale
        )
        experts = [f"{layer}.mlp.experts.{expert}" for expert in range(moe.num_experts)]
        self._gate_up = packer.experts(experts, ("gate_proj", "up_proj"))
        self._down = packer.experts(experts, ("down_proj",))
        shared = f"{layer}.mlp.shared_experts"
        self._shared = (
            (packer.linear(shared, ("gate_proj", "up_proj")), packer.linear(shared, ("down_proj",)))
            if moe.shared_size
            else None
        )
        self._eps = config.rms_norm_eps
        self._ops = ops

    def __call__(self, x_TH: Tensor) -> Tensor:
        ops = self._ops
        normed_TH = ops.rms_norm(x_TH, self._norm_H, self._eps)
        router_TE = ops.logits(normed_TH, self._gate)
        if self._shared is not None:
            gate_up, down = self._shared
            x_TH = ops.linear(ops.silu_mul(ops.linear(normed_TH, gate_up)), down, x_TH)
        return x_TH + ops.moe(normed_TH, router_TE, self._router, self._gate_up, self._down)


class LayerOps(Protocol):
    """The part of `Ops` that runs layers. Methods as there."""

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor: ...

    def dense_layers(
        self, x_TH: Tensor, run: DenseLayers, kv: Sequence[tuple[Tensor, Tensor]], rows: AttentionRows
    ) -> Tensor: ...


class DenseRun:
    """Layers in order, all with dense MLPs: one call of the back end."""

    def __init__(
        self, indices: Sequence[int], layers: Sequence[tuple[AttentionBlock, MlpBlock]], ops: LayerOps
    ) -> None:
        self.indices = indices
        self._layers, self._ops = DenseLayers(tuple(layers)), ops

    def __call__(self, x_TH: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return self._ops.dense_layers(x_TH, self._layers, kv, rows)

    def subset(self, indices: Sequence[int]) -> DenseRun:
        kept = [layer for index, layer in zip(self.indices, self._layers.layers, strict=True) if index in indices]
        return DenseRun(indices, kept, self._ops)

    def through(self, ops: LayerOps) -> DenseRun:
        return DenseRun(self.indices, self._layers.layers, ops)

    def scaled(self, kv_scale_L2K: Tensor) -> DenseRun:
        layers = [(_scaled(attention, kv_scale_L2K), mlp) for attention, mlp in self._layers.layers]
        return DenseRun(self.indices, layers, self._ops)


class SparseRun:
    """Layers in order, all with experts."""

    def __init__(
        self, indices: Sequence[int], layers: Sequence[tuple[AttentionBlock, SparseMlp]], ops: LayerOps
    ) -> None:
        self.indices = indices
        self._layers, self._ops = layers, ops

    def __call__(self, x_TH: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        for (attention, mlp), (k_pages, v_pages) in zip(self._layers, kv, strict=True):
            x_TH = mlp(self._ops.attention_block(x_TH, attention, k_pages, v_pages, rows))
        return x_TH

    def subset(self, indices: Sequence[int]) -> SparseRun:
        kept = [layer for index, layer in zip(self.indices, self._layers, strict=True) if index in indices]
        return SparseRun(indices, kept, self._ops)

    def through(self, ops: LayerOps) -> SparseRun:
        return SparseRun(self.indices, self._layers, ops)

    def scaled(self, kv_scale_L2K: Tensor) -> SparseRun:
        layers = [(_scaled(attention, kv_scale_L2K), mlp) for attention, mlp in self._layers]
        return SparseRun(self.indices, layers, self._ops)


def _scaled(attention: AttentionBlock, kv_scale_L2K: Tensor) -> AttentionBlock:
    scale_2K = kv_scale_L2K[attention.layer].to(attention.cos_sin_MR.device)
    return replace(attention, kv_scale_2K=scale_2K.contiguous())


def layer_runs(config: ModelConfig, packer: Packer, ops: Ops, cos_sin_MR: Tensor) -> list[DenseRun | SparseRun]:
    """All layers, in order, as runs of one kind."""
    sparse = frozenset() if config.moe is None else frozenset(config.moe.sparse_layers)
    runs: list[DenseRun | SparseRun] = []
    for is_sparse, group in groupby(range(config.num_layers), key=sparse.__contains__):
        indices = list(group)
        attention = (attention_block(config, i, packer, cos_sin_MR) for i in indices)
        if is_sparse:
            experts = (SparseMlp(config, i, packer, ops) for i in indices)
            runs.append(SparseRun(indices, list(zip(attention, experts, strict=True)), ops))
        else:
            dense = (mlp_block(config, i, packer) for i in indices)
            runs.append(DenseRun(indices, list(zip(attention, dense, strict=True)), ops))
    return runs


class Decoder:
    """Embedding, layers, final norm, head: what `registry.Model` asks for. The caller holds torch.inference_mode."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, cos_sin_MR: Tensor) -> None:
        packer = Packer(weights, ops)
        self.config = config
        self._embedding_VH = packer.tensor("model.embed_tokens.weight")
        self._runs = layer_runs(config, packer, ops, cos_sin_MR)
        self._norm_H = packer.tensor("model.norm.weight")
        # A tied head is packed all the same: rows are looked up in one layout and multiplied in another.
        tied = config.tie_word_embeddings
        self._head = packer.pack(self._embedding_VH if tied else weights.take("lm_head.weight"))
        self._eps = config.rms_norm_eps
        self._ops = ops
        self.num_weight_bytes = packer.num_bytes

    def forward(self, tokens_T: Tensor, rows: AttentionRows, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Run all rows of a step, tokens int64 [T]; writes K and V, returns normed hidden states [T, H]."""
        x_TH = self._ops.embed(self._embedding_VH, tokens_T)
        for run in self._runs:
            x_TH = run(x_TH, rows, [kv[index] for index in run.indices])
        return self._ops.rms_norm(x_TH, self._norm_H, self._eps)

    def subset(self, layers: Collection[int]) -> Decoder:
        """The same weights running these layers alone; its `forward` takes the pages of all layers, too."""
        part = copy.copy(self)
        part._runs = [run.subset(kept) for run in self._runs if (kept := [i for i in run.indices if i in layers])]
        return part

    def through(self, ops: LayerOps) -> Decoder:
        """The same weights whose layers run through `ops`, which has them from the back end that packed them."""
        part = copy.copy(self)
        part._runs = [run.through(ops) for run in self._runs]
        return part

    def scaled(self, kv_scale_L2K: Tensor) -> Decoder:
        """The same weights over fp8 pages with these scales, `Ops.qkv_rope_write`'s of each layer."""
        part = copy.copy(self)
        part._runs = [run.scaled(kv_scale_L2K) for run in self._runs]
        return part

    def logits(self, hidden_JH: Tensor) -> Tensor:
        """float32 [J, V] of rows that `forward` returned."""
        return self._ops.logits(hidden_JH, self._head)

"""Qwen3-MoE: Qwen3 attention; every `decoder_sparse_step`-th layer routes each token to its top experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.config import CheckpointError, Fields, ModelConfig, Moe, common_config, with_defaults

DEFAULTS = {"sliding_window": 4096, "num_experts_per_tok": 8, "decoder_sparse_step": 1}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = with_defaults(raw, DEFAULTS)
    bias = fields.boolean("attention_bias")
    # Unlike the dense family, an open window slides in every layer (transformers' Qwen3MoeAttention).
    window = fields.integer("sliding_window") if fields.boolean("use_sliding_window") else None
    windows = (window,) * fields.integer("num_hidden_layers")
    return common_config(
        fields.raw, windows=windows, qkv_bias=bias, output_bias=bias, qk_norm=True, moe=_read_moe(fields)
    )


def _read_moe(fields: Fields) -> Moe:
    """`num_experts` is called `num_local_experts` in newer files; `mlp_only_layers` stay dense."""
    name = "num_experts" if fields.get("num_experts") is not None else "num_local_experts"
    num_experts, top_k = fields.integer(name), fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise CheckpointError(f"config.json: num_experts_per_tok is {top_k}, but there are {num_experts} experts")
    step, dense = fields.integer("decoder_sparse_step"), fields.integers("mlp_only_layers")
    sparse = (index for index in range(fields.integer("num_hidden_layers")) if (index + 1) % step == 0)
    return Moe(
        num_experts,
        top_k,
        fields.integer("moe_intermediate_size"),
        fields.boolean("norm_topk_prob"),
        frozenset(sparse).difference(dense),
    )

"""LLaDA 2.0 and 2.1: blocks of 32, rows see all blocks up to their own; experts chosen by groups beside a shared one.

The layout is Ling 2's: q, k and v in one tensor, half of each head rotated, the first layers dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from server.models.config import CheckpointError, Fields, ModelConfig, Moe, common_config, with_defaults
from server.models.diffusion import denoising

MASK, END_OF_TEXT, BLOCK = 156895, 156892, 32

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "model.word_embeddings": "model.embed_tokens",
        "model.layers.{}.attention.query_key_value": "model.layers.{}.self_attn.qkv_proj",
        "model.layers.{}.attention.query_layernorm": "model.layers.{}.self_attn.q_norm",
        "model.layers.{}.attention.key_layernorm": "model.layers.{}.self_attn.k_norm",
        "model.layers.{}.attention.dense": "model.layers.{}.self_attn.o_proj",
    }
)

DEFAULTS = {
    "partial_rotary_factor": 0.5,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 0,
    "num_shared_experts": 0,
}

_ONLY: Mapping[str, Any] = MappingProxyType(
    {
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # Published code scales the weights to sum to one whatever the file says.
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "norm_head": False,
    }
)
"""Switches that the released models leave at these values."""


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = with_defaults(raw, DEFAULTS)
    fields.expect(_ONLY)
    window = fields.integer("sliding_window") if fields.boolean("use_sliding_window") else None
    config = common_config(
        fields.raw,
        windows=(window,) * fields.integer("num_hidden_layers"),
        qk_norm=True,
        fused_qkv=True,
        partial_rotary=True,
        moe=_read_moe(fields),
    )
    return denoising(config, raw, mask_token_id=MASK, block_size=BLOCK, eos_token_id=END_OF_TEXT)


def _read_moe(fields: Fields) -> Moe:
    num_experts, top_k = fields.integer("num_experts"), fields.integer("num_experts_per_tok")
    num_groups, top_groups = fields.integer("n_group"), fields.integer("topk_group")
    if num_experts % num_groups or num_experts < 2 * num_groups:
        raise CheckpointError(
            f"config.json: {num_experts} experts do not make n_group = {num_groups} groups of two or more"
        )
    if top_groups > num_groups or top_k > num_experts // num_groups * top_groups:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {top_k}, but topk_group = {top_groups} of {num_groups} groups hold "
            f"{num_experts // num_groups * min(top_groups, num_groups)} experts"
        )
    num_layers = fields.integer("num_hidden_layers")
    size = fields.integer("moe_intermediate_size")
    return Moe(
        num_experts,
        top_k,
        size,
        # The publishers' code leaves a single expert's weight as it is.
        norm_topk_prob=top_k > 1,
        sparse_layers=frozenset(range(fields.integer("first_k_dense_replace", minimum=0), num_layers)),
        shared_size=size * fields.integer("num_shared_experts", minimum=0),
        is_sigmoid=True,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=fields.number("routed_scaling_factor", 1.0),
    )

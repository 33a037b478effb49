"""Configurations as published: their shapes add up to the published numbers of parameters, and denoise as documented.

Entries that say nothing to us are left out. No weights are made.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.models.layers import weight_shapes
from server.models.registry import parse_config

QWEN: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
}

PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "LLaDA-8B-Instruct": (
        {
            "model_type": "llada",
            "activation_type": "silu",
            "alibi": False,
            "attention_layer_norm": False,
            "block_type": "llama",
            "d_model": 4096,
            "embedding_size": 126464,
            "eos_token_id": 126081,
            "include_bias": False,
            "include_qkv_bias": False,
            "layer_norm_type": "rms",
            "mask_token_id": 126336,
            "max_sequence_length": 4096,
            "mlp_hidden_size": 12288,
            "mlp_ratio": 4,
            "multi_query_attention": None,
            "n_heads": 32,
            "n_kv_heads": 32,
            "n_layers": 32,
            "pad_token_id": 126081,
            "rms_norm_eps": 1e-5,
            "rope": True,
            "rope_theta": 500000.0,
            "vocab_size": 126464,
            "weight_tying": False,
        },
        8.02e9,
    ),
    "Dream-v0-Instruct-7B": (
        QWEN
        | {
            "model_type": "Dream",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
            "mask_token_id": 151666,
            "eos_token_id": 151643,
        },
        7.62e9,
    ),
    "Fast_dLLM_v2_1.5B": (
        QWEN
        | {
            "model_type": "Fast_dLLM_Qwen",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "bd_size": 32,
        },
        1.54e9,
    ),
    "SDAR-30B-A3B-Chat": (
        QWEN
        | {
            "model_type": "sdar_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "max_position_embeddings": 32768,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
        30.5e9,
    ),
    "SDAR-4B-Chat": (
        QWEN
        | {
            "model_type": "sdar",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        4.02e9,
    ),
    "LLaDA2.0-mini": (
        {
            "model_type": "llada2_moe",
            "first_k_dense_replace": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "max_position_embeddings": 32768,
            "moe_intermediate_size": 512,
            "n_group": 8,
            "norm_head": False,
            "norm_topk_prob": True,
            "num_attention_heads": 16,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 20,
            "num_key_value_heads": 4,
            "num_shared_experts": 1,
            "pad_token_id": 156892,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-6,
            "rope_theta": 600000,
            "routed_scaling_factor": 2.5,
            "score_function": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 4,
            "vocab_size": 157184,
        },
        16.3e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_number_of_parameters(name: str) -> None:
    raw, parameters = PUBLISHED[name]
    config = parse_config(raw)
    found = sum(math.prod(shape) for _, shape in weight_shapes(config))
    assert found == pytest.approx(parameters, rel=0.005)


def test_half_of_each_head_of_llada_2_is_rotated() -> None:
    config = parse_config(PUBLISHED["LLaDA2.0-mini"][0])
    assert (config.head_dim, config.rope.dim, config.rope.theta) == (128, 64, 600000.0)
    assert config.moe is not None
    assert config.moe.sparse_layers == frozenset(range(1, 20))

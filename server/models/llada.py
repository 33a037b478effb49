"""LLaDA 8B and 1.5: a Llama without a mask, in its own words: field names of OLMo, and tensors named after them.

Every row sees the whole canvas. The head and each layer's down projection are both called `ff_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from server.models.config import CheckpointError, Fields, ModelConfig, common_config, with_defaults
from server.models.diffusion import denoising

MASK, END_OF_TEXT, BLOCK = 126336, 126081, 32

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "model.transformer.wte": "model.embed_tokens",
        "model.transformer.blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
        "model.transformer.blocks.{}.q_proj": "model.layers.{}.self_attn.q_proj",
        "model.transformer.blocks.{}.k_proj": "model.layers.{}.self_attn.k_proj",
        "model.transformer.blocks.{}.v_proj": "model.layers.{}.self_attn.v_proj",
        "model.transformer.blocks.{}.attn_out": "model.layers.{}.self_attn.o_proj",
        "model.transformer.blocks.{}.ff_norm": "model.layers.{}.post_attention_layernorm",
        "model.transformer.blocks.{}.ff_proj": "model.layers.{}.mlp.gate_proj",
        "model.transformer.blocks.{}.up_proj": "model.layers.{}.mlp.up_proj",
        "model.transformer.blocks.{}.ff_out": "model.layers.{}.mlp.down_proj",
        "model.transformer.ln_f": "model.norm",
        "model.transformer.ff_out": "lm_head",
    }
)

DEFAULTS = {"rms_norm_eps": 1e-5, "mlp_ratio": 4}

_ONLY: Mapping[str, Any] = MappingProxyType(
    {
        "block_type": "llama",
        "block_group_size": 1,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "activation_type": "silu",
        "rope": True,
        "alibi": False,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "multi_query_attention": False,
    }
)
"""Switches of the publishers' code that the released models leave at these values."""


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = with_defaults(raw, DEFAULTS)
    if fields.get("num_experts") is not None:
        raise CheckpointError(
            "config.json: num_experts is set; LLaDA-MoE, published under the same model_type, is not supported"
        )
    fields.expect(_ONLY)
    config = common_config({**fields.raw, **_in_our_words(fields)})
    return denoising(config, raw, mask_token_id=MASK, block_size=BLOCK, eos_token_id=END_OF_TEXT, bidirectional=True)


def _in_our_words(fields: Fields) -> dict[str, Any]:
    """The published fields under the names that `common_config` reads."""
    hidden_size, num_heads = fields.integer("d_model"), fields.integer("n_heads")
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.integer("n_layers"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("n_kv_heads", default=num_heads),
        "intermediate_size": fields.integer("mlp_hidden_size", default=fields.integer("mlp_ratio") * hidden_size),
        # Rows of the embedding and of the head; vocab_size may be the tokenizer's, which is smaller.
        "vocab_size": fields.integer("embedding_size", default=fields.integer("vocab_size")),
        "max_position_embeddings": fields.integer("max_sequence_length"),
        "tie_word_embeddings": fields.boolean("weight_tying"),
    }

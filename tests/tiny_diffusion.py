"""Configurations and tensors of tiny diffusion checkpoints, in each publisher's own words; `tests/tiny.py` writes them.

As there, names and shapes are spelt out by hand. Qwen-shaped families share Qwen's tensors and are made in tiny.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MASK = 320
"""The first id behind the tokenizer's; vocabularies are padded to DIFFUSION_VOCAB, as published ones are."""
DIFFUSION_VOCAB = 328

DIFFUSION = {
    "sdar": "SDARForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
    "Fast_dLLM_Qwen": "Fast_dLLM_QwenForCausalLM",
    "llada": "LLaDAModelLM",
    "Dream": "DreamModel",
    "llada2_moe": "LLaDA2MoeModelLM",
}

QWEN_SHAPED: dict[str, dict[str, Any]] = {
    "sdar": {"mask_token_id": MASK, "block_size": 4},
    "sdar_moe": {"mask_token_id": MASK, "block_size": 4},
    "Fast_dLLM_Qwen": {"mask_token_id": MASK, "bd_size": 8, "use_sliding_window": False},
    "Dream": {"mask_token_id": MASK, "use_mrope": False, "use_sliding_window": False, "sliding_window": None},
}
"""What these files have beside Qwen's fields."""

LLADA: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 64,
    "embedding_size": DIFFUSION_VOCAB,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 512,
    "mlp_hidden_size": 96,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": DIFFUSION_VOCAB - 4,
    "weight_tying": False,
}

LLADA2_MOE: dict[str, Any] = {
    "vocab_size": DIFFUSION_VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "norm_head": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "mask_token_id": MASK,
    "block_size": 8,
}


class Maker:
    """Random tensors from one generator: weights of scale 1 / sqrt(inputs), norms around one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def table(self, rows: int, size: int) -> Tensor:
        return torch.randn(rows, size, generator=self._generator)

    def weight(self, num_out: int, num_in: int) -> Tensor:
        return torch.randn(num_out, num_in, generator=self._generator) / math.sqrt(num_in)

    def bias(self, size: int) -> Tensor:
        return torch.randn(size, generator=self._generator) * 0.1

    def norm(self, size: int) -> Tensor:
        return 1 + self.bias(size)


def llada_tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    make, hidden, inner = Maker(seed), config["d_model"], config["mlp_hidden_size"]
    kv_size = hidden // config["n_heads"] * config["n_kv_heads"]
    yield "model.transformer.wte.weight", make.table(config["embedding_size"], hidden)
    for index in range(config["n_layers"]):
        block = f"model.transformer.blocks.{index}"
        yield f"{block}.attn_norm.weight", make.norm(hidden)
        yield f"{block}.ff_norm.weight", make.norm(hidden)
        yield f"{block}.q_proj.weight", make.weight(hidden, hidden)
        yield f"{block}.k_proj.weight", make.weight(kv_size, hidden)
        yield f"{block}.v_proj.weight", make.weight(kv_size, hidden)
        yield f"{block}.attn_out.weight", make.weight(hidden, hidden)
        yield f"{block}.ff_proj.weight", make.weight(inner, hidden)
        yield f"{block}.up_proj.weight", make.weight(inner, hidden)
        yield f"{block}.ff_out.weight", make.weight(hidden, inner)
    yield "model.transformer.ln_f.weight", make.norm(hidden)
    if not config["weight_tying"]:
        yield "model.transformer.ff_out.weight", make.weight(config["embedding_size"], hidden)


def llada2_moe_tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    make, hidden, head_dim = Maker(seed), config["hidden_size"], config["head_dim"]
    num_q, num_kv, size = config["num_attention_heads"], config["num_key_value_heads"], config["moe_intermediate_size"]

    def mlp(name: str, inner: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.gate_proj.weight", make.weight(inner, hidden)
        yield f"{name}.up_proj.weight", make.weight(inner, hidden)
        yield f"{name}.down_proj.weight", make.weight(hidden, inner)

    yield "model.word_embeddings.weight", make.table(config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", make.norm(hidden)
        yield f"{layer}.post_attention_layernorm.weight", make.norm(hidden)
        yield f"{layer}.attention.query_key_value.weight", make.weight((num_q + 2 * num_kv) * head_dim, hidden)
        yield f"{layer}.attention.query_layernorm.weight", make.norm(head_dim)
        yield f"{layer}.attention.key_layernorm.weight", make.norm(head_dim)
        yield f"{layer}.attention.dense.weight", make.weight(hidden, num_q * head_dim)
        if index < config["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        yield f"{layer}.mlp.gate.weight", make.weight(config["num_experts"], hidden)
        yield f"{layer}.mlp.gate.expert_bias", make.bias(config["num_experts"])
        for expert in range(config["num_experts"]):
            yield from mlp(f"{layer}.mlp.experts.{expert}", size)
        if config["num_shared_experts"]:
            yield from mlp(f"{layer}.mlp.shared_experts", size * config["num_shared_experts"])
    yield "model.norm.weight", make.norm(hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", make.weight(config["vocab_size"], hidden)

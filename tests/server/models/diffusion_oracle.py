"""The published formulas of the diffusion families, one sequence at a time over dense attention, in plain torch.

Nothing of `server.models` or `kernels` is used: names, splits, rotation, mask and routing are written out again from
the publishers' code, in float32. `expected_logits` is all that the tests call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Get = Callable[[str], Tensor]
"""A tensor of the checkpoint by its published name."""


def expected_logits(path: Path, tokens: Sequence[int], block_size: int | None) -> Tensor:
    """float32 [tokens, vocab], row by row as the model gives them, not shifted.

    block_size  a row sees all keys of its own block and of those before it; None = all keys
    """
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    block = torch.arange(len(tokens)) // (block_size or len(tokens))
    mask = block[:, None] >= block[None, :]
    run = {"llada": _llada, "llada2_moe": _llada2_moe}.get(config["model_type"], _qwen)
    return run(config, tensors.__getitem__, torch.tensor(tokens), mask)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x_hTD: Tensor, theta: float, dim: int) -> Tensor:
    """x cos + rotate_half(x) sin on the first `dim` elements, with the cosines of both halves spelt out."""
    frequencies = theta ** (-torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(x_hTD.shape[1]).float()[:, None] * frequencies[None, :]
    cos, sin = (torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))
    turned, rest = x_hTD[..., :dim], x_hTD[..., dim:]
    half = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), -1)
    return torch.cat((turned * cos + half * sin, rest), -1)


def heads(x_TX: Tensor, count: int) -> Tensor:
    return x_TX.view(x_TX.shape[0], count, -1).transpose(0, 1)


def attend(q_hTD: Tensor, k_hTD: Tensor, v_hTD: Tensor, mask: Tensor) -> Tensor:
    """[T, heads * D]; query head h reads kv head h // group."""
    group = q_hTD.shape[0] // k_hTD.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k_hTD, v_hTD))
    scores = q_hTD @ k.transpose(1, 2) / q_hTD.shape[2] ** 0.5
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return (weights @ v).transpose(0, 1).flatten(1)


def gated(y: Tensor, get: Get, gate: str, up: str, down: str) -> Tensor:
    return F.linear(F.silu(F.linear(y, get(gate))) * F.linear(y, get(up)), get(down))


def gated_hf(y: Tensor, get: Get, name: str) -> Tensor:
    return gated(y, get, *(f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")))


def _llada(config: dict[str, Any], get: Get, tokens: Tensor, mask: Tensor) -> Tensor:
    eps, theta, width = config["rms_norm_eps"], config["rope_theta"], config["d_model"] // config["n_heads"]
    x = get("model.transformer.wte.weight")[tokens]
    for index in range(config["n_layers"]):
        block = f"model.transformer.blocks.{index}"
        y = rms(x, get(f"{block}.attn_norm.weight"), eps)
        q, k, v = (F.linear(y, get(f"{block}.{name}_proj.weight")) for name in "qkv")
        q, k, v = heads(q, config["n_heads"]), heads(k, config["n_kv_heads"]), heads(v, config["n_kv_heads"])
        x = x + F.linear(attend(rope(q, theta, width), rope(k, theta, width), v, mask), get(f"{block}.attn_out.weight"))
        y = rms(x, get(f"{block}.ff_norm.weight"), eps)
        x = x + gated(y, get, *(f"{block}.{name}.weight" for name in ("ff_proj", "up_proj", "ff_out")))
    head = "model.transformer.wte.weight" if config["weight_tying"] else "model.transformer.ff_out.weight"
    return F.linear(rms(x, get("model.transformer.ln_f.weight"), eps), get(head))


def _qwen(config: dict[str, Any], get: Get, tokens: Tensor, mask: Tensor) -> Tensor:
    """SDAR (Qwen3, dense or with experts: norms on q and k), Fast-dLLM v2 and Dream (Qwen2: biases on q, k and v)."""
    eps, theta, width = config["rms_norm_eps"], config["rope_theta"], config["head_dim"]
    num_q, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    is_qwen3 = config["model_type"].startswith("sdar")
    x = get("model.embed_tokens.weight")[tokens]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        y = rms(x, get(f"{layer}.input_layernorm.weight"), eps)
        q, k, v = (
            F.linear(
                y,
                get(f"{layer}.self_attn.{name}_proj.weight"),
                None if is_qwen3 else get(f"{layer}.self_attn.{name}_proj.bias"),
            )
            for name in "qkv"
        )
        q, k, v = heads(q, num_q), heads(k, num_kv), heads(v, num_kv)
        if is_qwen3:
            q, k = (rms(z, get(f"{layer}.self_attn.{name}_norm.weight"), eps) for z, name in ((q, "q"), (k, "k")))
        attended = attend(rope(q, theta, width), rope(k, theta, width), v, mask)
        x = x + F.linear(attended, get(f"{layer}.self_attn.o_proj.weight"))
        y = rms(x, get(f"{layer}.post_attention_layernorm.weight"), eps)
        if config["model_type"] == "sdar_moe":
            x = x + _softmax_experts(config, get, f"{layer}.mlp", y)
        else:
            x = x + gated_hf(y, get, f"{layer}.mlp")
    tied = config["tie_word_embeddings"]
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return F.linear(rms(x, get("model.norm.weight"), eps), get(head))


def _softmax_experts(config: dict[str, Any], get: Get, name: str, y_TH: Tensor) -> Tensor:
    rows = []
    for y in y_TH:
        weights, experts = torch.softmax(get(f"{name}.gate.weight") @ y, -1).topk(config["num_experts_per_tok"])
        weights = weights / weights.sum()
        rows.append(
            sum(w * gated_hf(y, get, f"{name}.experts.{int(e)}") for w, e in zip(weights, experts, strict=True))
        )
    return torch.stack(rows)


def _llada2_moe(config: dict[str, Any], get: Get, tokens: Tensor, mask: Tensor) -> Tensor:
    eps, theta, width = config["rms_norm_eps"], config["rope_theta"], config["head_dim"]
    num_q, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = int(width * config["partial_rotary_factor"])
    x = get("model.word_embeddings.weight")[tokens]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        y = rms(x, get(f"{layer}.input_layernorm.weight"), eps)
        qkv = F.linear(y, get(f"{layer}.attention.query_key_value.weight"))
        q, k, v = torch.split(heads(qkv, num_q + 2 * num_kv), [num_q, num_kv, num_kv])
        q = rope(rms(q, get(f"{layer}.attention.query_layernorm.weight"), eps), theta, dim)
        k = rope(rms(k, get(f"{layer}.attention.key_layernorm.weight"), eps), theta, dim)
        x = x + F.linear(attend(q, k, v, mask), get(f"{layer}.attention.dense.weight"))
        y = rms(x, get(f"{layer}.post_attention_layernorm.weight"), eps)
        if index < config["first_k_dense_replace"]:
            x = x + gated_hf(y, get, f"{layer}.mlp")
        else:
            x = x + _grouped_experts(config, get, f"{layer}.mlp", y)
    return F.linear(rms(x, get("model.norm.weight"), eps), get("lm_head.weight"))


def _grouped_experts(config: dict[str, Any], get: Get, name: str, y_TH: Tensor) -> Tensor:
    rows = []
    for y in y_TH:
        scores = torch.sigmoid(get(f"{name}.gate.weight") @ y)
        ranks = scores + get(f"{name}.gate.expert_bias")
        groups = ranks.view(config["n_group"], -1)
        best = groups.topk(2).values.sum(-1).topk(config["topk_group"]).indices.tolist()
        size = groups.shape[1]
        allowed = [expert for group in best for expert in range(group * size, (group + 1) * size)]
        chosen = sorted(allowed, key=lambda expert: -float(ranks[expert]))[: config["num_experts_per_tok"]]
        total = scores[chosen].sum() + 1e-20 if len(chosen) > 1 else 1.0
        routed = sum(
            scores[expert] / total * config["routed_scaling_factor"] * gated_hf(y, get, f"{name}.experts.{expert}")
            for expert in chosen
        )
        shared = gated_hf(y, get, f"{name}.shared_experts") if config["num_shared_experts"] else 0.0
        rows.append(routed + shared)
    return torch.stack(rows)

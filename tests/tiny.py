"""Tiny checkpoints in the published format: config.json, safetensors, tokenizer. Random weights, a second to write.

The tensor names and shapes are spelt out here, independently of `server/models`, so that a wrong name there shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from tests.tiny_diffusion import (
    DIFFUSION,
    DIFFUSION_VOCAB,
    LLADA,
    LLADA2_MOE,
    QWEN_SHAPED,
    llada2_moe_tensors,
    llada_tensors,
)

VOCAB_SIZE = 320
PAD, BOS, EOS = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""Those that transformers knows, too; `tests.tiny_diffusion.DIFFUSION` has the others."""

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the dog sleeps",
    "def sort(items): return sorted(items)",
    "sort: 7 3 9 -> 3 7 9",
    '{"name": "a", "value": 1}',
)


def tiny_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A config.json with 2 layers, hidden 64, 4 query and 2 kv heads of 16; `overrides` replace or add entries.

    llada has as many kv heads as query heads, llada2_moe a dense layer more.
    """
    head: dict[str, Any] = {"architectures": [(ARCHITECTURES | DIFFUSION)[model_type]], "model_type": model_type}
    if model_type in DIFFUSION:
        head["auto_map"] = {"AutoModel": f"modeling.{DIFFUSION[model_type]}"}  # all of them come with code
    ends = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "dtype": "float32"}
    if model_type in ("llada", "llada2_moe"):
        return head | (LLADA if model_type == "llada" else LLADA2_MOE) | ends | overrides
    config: dict[str, Any] = head | {
        "vocab_size": DIFFUSION_VOCAB if model_type in DIFFUSION else VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **ends,
    }
    if model_type == "mistral":
        config["sliding_window"] = None
    if model_type in ("qwen3_moe", "sdar_moe"):
        config |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        }
    return config | QWEN_SHAPED.get(model_type, {}) | overrides


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its published name, float32; linear weights of scale 1 / sqrt(inputs)."""
    model_type = config["model_type"]
    if model_type in ("llada", "llada2_moe"):
        yield from (llada_tensors if model_type == "llada" else llada2_moe_tensors)(config, seed)
        return
    generator = torch.Generator().manual_seed(seed)
    hidden, vocab, head_dim = config["hidden_size"], config["vocab_size"], config["head_dim"]
    num_q, num_kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def weight(num_out: int, num_in: int) -> Tensor:
        return torch.randn(num_out, num_in, generator=generator) / math.sqrt(num_in)

    def bias(size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 0.1

    def linear(name: str, num_out: int, num_in: int, with_bias: bool) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", weight(num_out, num_in)
        if with_bias:
            yield f"{name}.bias", bias(num_out)

    def mlp(name: str, size: int, with_bias: bool) -> Iterator[tuple[str, Tensor]]:
        yield from linear(f"{name}.gate_proj", size, hidden, with_bias)
        yield from linear(f"{name}.up_proj", size, hidden, with_bias)
        yield from linear(f"{name}.down_proj", hidden, size, with_bias)

    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    yield "model.embed_tokens.weight", torch.randn(vocab, hidden, generator=generator)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, num_out in (("q", num_q), ("k", num_kv), ("v", num_kv)):
            biased = attention_bias or model_type in ("qwen2", "Fast_dLLM_Qwen", "Dream")
            yield from linear(f"{layer}.self_attn.{name}_proj", num_out, hidden, biased)
        yield from linear(f"{layer}.self_attn.o_proj", hidden, num_q, attention_bias)
        if model_type.startswith(("qwen3", "sdar")):
            yield f"{layer}.self_attn.q_norm.weight", 1 + bias(head_dim)
            yield f"{layer}.self_attn.k_norm.weight", 1 + bias(head_dim)
        if _is_sparse(config, index):
            yield f"{layer}.mlp.gate.weight", weight(config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"], False)
        else:
            yield from mlp(f"{layer}.mlp", config["intermediate_size"], mlp_bias)
        yield f"{layer}.input_layernorm.weight", 1 + bias(hidden)
        yield f"{layer}.post_attention_layernorm.weight", 1 + bias(hidden)
    yield "model.norm.weight", 1 + bias(hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", weight(vocab, hidden)


def _is_sparse(config: dict[str, Any], index: int) -> bool:
    if config["model_type"] not in ("qwen3_moe", "sdar_moe") or index in config["mlp_only_layers"]:
        return False
    return (index + 1) % int(config["decoder_sparse_step"]) == 0


def write_tiny_tokenizer(path: Path) -> None:
    """A byte-level BPE of at most VOCAB_SIZE tokens (256 bytes, <pad>, <bos>, <eos>, merges), chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_tiny_checkpoint(
    path: Path | str,
    model_type: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    seed: int = 0,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a checkpoint folder and return it; `overrides` go into config.json.

    num_shards > 1 writes model-0000i-of-0000n.safetensors and the index file.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(model_type, **({"dtype": str(dtype).removeprefix("torch.")} | overrides))
    (path / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (path / "generation_config.json").write_text(json.dumps(generation))
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_tensors(config, seed)}
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(path, tensors, num_shards)
    if tokenizer:
        write_tiny_tokenizer(path)
    return path


def _write_shards(path: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        chosen = names[shard::num_shards]
        save_file({name: tensors[name] for name in chosen}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))

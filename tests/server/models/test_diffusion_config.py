"""What config.json says of a model that denoises: read, filled in where publishers leave it out, refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.models.config import CheckpointError, ModelConfig
from server.models.registry import parse_config
from tests.tiny import EOS, tiny_config
from tests.tiny_diffusion import DIFFUSION, DIFFUSION_VOCAB, MASK


def parse(model_type: str, **overrides: Any) -> ModelConfig:
    raw = tiny_config(model_type, **overrides)
    return parse_config({name: value for name, value in raw.items() if value != "absent"})


@pytest.mark.parametrize("model_type", DIFFUSION)
def test_how_a_family_denoises_is_in_its_configuration(model_type: str) -> None:
    config = parse(model_type)
    is_bidirectional, shift, block = {
        "sdar": (False, 0, 4),
        "sdar_moe": (False, 0, 4),
        "Fast_dLLM_Qwen": (False, 1, 8),
        "llada": (True, 0, 32),
        "Dream": (True, 1, 32),
        "llada2_moe": (False, 0, 8),
    }[model_type]
    assert (config.bidirectional, config.logit_shift, config.block_size) == (is_bidirectional, shift, block)
    assert (config.mask_token_id, config.eos_token_ids, config.is_causal) == (MASK, (EOS,), False)
    assert config.max_position == 512
    assert config.block_size_is_default == is_bidirectional


@pytest.mark.parametrize(
    ("model_type", "mask", "block", "ends"),
    [
        ("sdar", 151669, 4, ()),
        ("sdar_moe", 151669, 4, ()),
        ("Fast_dLLM_Qwen", 151665, 32, (151645,)),
        ("llada", 126336, 32, (126081,)),
        ("Dream", 151666, 32, (151643,)),
        ("llada2_moe", 156895, 32, (156892,)),
    ],
)
def test_what_the_file_leaves_out_is_what_its_publishers_use(
    model_type: str, mask: int, block: int, ends: tuple[int, ...]
) -> None:
    size = {"embedding_size" if model_type == "llada" else "vocab_size": 157184}
    absent = dict.fromkeys(("mask_token_id", "block_size", "bd_size", "eos_token_id"), "absent")
    config = parse(model_type, **size, **absent)
    assert (config.mask_token_id, config.block_size, config.eos_token_ids) == (mask, block, ends)
    assert config.block_size_is_default


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mask outside": ("sdar", {"mask_token_id": 328}, r"mask_token_id is \[328\], but vocab_size is 328"),
    "default mask outside": ("Dream", {"mask_token_id": None}, r"mask_token_id is \[151666\]"),
    "mask ends": ("sdar", {"eos_token_id": [2, MASK]}, "both mask_token_id and an eos_token_id"),
    "block": ("sdar", {"block_size": 0}, "block_size is 0"),
    "bd_size": ("Fast_dLLM_Qwen", {"bd_size": "32"}, "bd_size is '32'"),
    "window": (
        "Dream",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        "use_sliding_window",
    ),
    "mrope": ("Dream", {"use_mrope": True}, "use_mrope is set"),
    "partial rotary": ("sdar", {"partial_rotary_factor": 0.5}, "not supported for this model_type"),
    "odd rotary": ("llada2_moe", {"partial_rotary_factor": 0.2}, "must leave an even number"),
    "no rotary": ("llada2_moe", {"partial_rotary_factor": 0.05}, "must leave an even number"),
    "groups": ("llada2_moe", {"n_group": 3}, "16 experts do not make n_group = 3"),
    "groups of one": ("llada2_moe", {"n_group": 16}, "groups of two or more"),
    "too many groups": ("llada2_moe", {"topk_group": 5}, "topk_group = 5 of 4 groups"),
    "too few in groups": ("llada2_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    "score": ("llada2_moe", {"score_function": "softmax"}, "score_function is 'softmax'; supported: 'sigmoid'"),
    "bias": ("llada2_moe", {"use_qkv_bias": True}, "use_qkv_bias is True"),
    "unnormalised": ("llada2_moe", {"norm_topk_prob": False}, "norm_topk_prob is False; supported: True"),
    "block type": ("llada", {"block_type": "sequential"}, "block_type is 'sequential'; supported: 'llama'"),
    "alibi": ("llada", {"alibi": True}, "alibi is True; supported: False"),
    "LLaDA-MoE": ("llada", {"num_experts": 64}, "LLaDA-MoE, published under the same model_type, is not supported"),
    "no rope": ("llada", {"rope": False}, "rope is False"),
    "field of LLaDA": ("llada", {"d_model": None}, "d_model is None"),
    "heads of LLaDA": ("llada", {"n_heads": 0}, "n_heads is 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what: str) -> None:
    model_type, overrides, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message):
        parse(model_type, **overrides)


def test_an_unknown_model_type_gets_the_list_of_all_families() -> None:
    known = ", ".join(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", *DIFFUSION))
    with pytest.raises(CheckpointError, match=f"model_type is 'dream'; supported: {known}"):
        parse_config(tiny_config("Dream") | {"model_type": "dream"})


def test_lladas_sizes_are_read_under_their_own_names() -> None:
    config = parse("llada", mlp_hidden_size=None, embedding_size=None, n_kv_heads=None, vocab_size=400)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (64, 2, 4, 4)
    assert (config.intermediate_size, config.vocab_size, config.rms_norm_eps) == (256, 400, 1e-5)
    assert config.rope.theta == 500000.0


def test_lladas_embedding_may_be_larger_than_its_vocabulary() -> None:
    assert parse("llada").vocab_size == DIFFUSION_VOCAB
    assert replace(parse("llada"), vocab_size=0) == replace(parse("llada", vocab_size=100), vocab_size=0)

"""config.json: what is read, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.models.config import CheckpointError, ModelConfig
from server.models.locate import ModelNotFoundError, resolve_model
from server.models.registry import MODELS, parse_config, read_config
from tests.tiny import ARCHITECTURES, tiny_config
from tests.tiny_diffusion import DIFFUSION


def parse(model_type: str = "llama", **overrides: Any) -> ModelConfig:
    return parse_config(tiny_config(model_type, **overrides))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model type": ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'; supported: llama, mistral, qwen2, qwen3"),
    "model type kind": ({"model_type": ["llama"]}, "model_type is"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints are not supported"),
    "soft-capping": ({"attn_logit_softcapping": 50.0}, "soft-capping is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
    "rope type": ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type is 'mrope'; supported: default, linear"),
    "rope per layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor is None; a positive number"),
    "longrope lists": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor must be a list of 8 numbers",
    ),
    "llama3 bands": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}},
        "high_freq_factor must be greater",
    ),
    "heads": ({"num_key_value_heads": 3}, "not a multiple"),
    "odd head": ({"head_dim": 15}, "head_dim is 15"),
    "missing size": ({"hidden_size": None}, "hidden_size is None; an integer >= 1"),
    "boolean size": ({"hidden_size": True}, "hidden_size is True"),
    "text size": ({"vocab_size": "320"}, "vocab_size is '320'"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8'; supported: float32, bfloat16, float16"),
    "eos": ({"eos_token_id": [2, 320]}, "eos_token_id is .*vocab_size is 320"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what: str) -> None:
    overrides, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message):
        parse_config(tiny_config() | overrides)


def test_every_registered_family_has_a_tiny_checkpoint() -> None:
    assert MODELS.keys() == ARCHITECTURES.keys() | DIFFUSION.keys()


def test_both_spellings_of_rope_give_the_same_rope() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 128}
    old = parse(rope_theta=7e4, rope_scaling={"type": "yarn"} | scaling)
    new = parse(rope_theta=None, rope_parameters={"rope_type": "yarn", "rope_theta": 7e4} | scaling)
    assert old.rope == new.rope
    assert old.rope.theta == 7e4


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}, 512),
    ],
)
def test_the_longest_sequence_follows_from_the_scaling(scaling: dict[str, Any], longest: int) -> None:
    assert parse(rope_scaling=scaling).max_position == longest


def test_windows_follow_each_familys_rule() -> None:
    open_window = {"use_sliding_window": True, "sliding_window": 9}
    assert parse("mistral", sliding_window=5).windows == (5, 5)
    assert parse("mistral", sliding_window=None).windows == (None, None)
    assert parse("qwen2", sliding_window=9, use_sliding_window=False).windows == (None, None)
    assert parse("qwen2", max_window_layers=1, **open_window).windows == (None, 9)
    assert parse("qwen3_moe", max_window_layers=1, **open_window).windows == (9, 9)
    without = tiny_config("mistral")
    del without["sliding_window"]
    assert parse_config(without).sliding_window == 4096


@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention", "linear_attention"], "full_attention"])
def test_layer_types_that_do_not_fit_are_refused(kinds: Any) -> None:
    with pytest.raises(CheckpointError, match="layer_types"):
        parse("qwen3", layer_types=kinds)


def test_end_of_text_ids_of_both_files_are_joined(tmp_path: Path) -> None:
    extra = {"mask_token_id": 5, "block_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3", eos_token_id=2, **extra)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    config = read_config(tmp_path)
    assert config.eos_token_ids == (2, 7)
    assert (config.mask_token_id, config.block_size) == (5, 8)
    assert config.dtype == torch.float32


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 50_000])
def test_a_broken_config_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "no such", ""])
def test_a_name_that_can_be_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder here, nor an embedded model"):
        resolve_model(name)


def test_a_file_is_not_a_checkpoint_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model(str(file))


def test_a_hub_id_is_taken_from_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789012345678901234567890123456789"
    repo = tmp_path / "models--owner--name"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    assert resolve_model("owner/name", download_dir=str(tmp_path)) == repo / "snapshots" / commit
    with pytest.raises(ModelNotFoundError, match="not in the hub cache"):
        resolve_model("owner/other", download_dir=str(tmp_path))

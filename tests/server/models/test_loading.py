"""Loading whole models: shards, tied heads, foreign tensors, quantised back ends, random shapes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.reference import ReferenceOps
from server.models.config import CheckpointError
from server.models.loading import load_model, random_model
from server.models.registry import Model
from tests.server.models.paged import PagedRunner
from tests.tiny import ARCHITECTURES, write_tiny_checkpoint

CPU = torch.device("cpu")
TOKENS = list(range(3, 23))
SPEC = "hidden=64,layers=2,heads=4,kv_heads=2,mlp=96,vocab=320"


def logits_of(model: Model) -> Tensor:
    return PagedRunner(model, ReferenceOps(), 1, len(TOKENS)).run([(0, 0, TOKENS)])[0]


def load(path: Path, **options: Any) -> Model:
    return load_model(path, ReferenceOps(), None, CPU, **options)


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")


def test_shards_and_a_single_file_load_as_the_same_model(tmp_path: Path) -> None:
    single = load(write_tiny_checkpoint(tmp_path / "one", tokenizer=False))
    sharded = load(write_tiny_checkpoint(tmp_path / "many", num_shards=4, tokenizer=False))
    assert torch.equal(logits_of(single), logits_of(sharded))


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(tmp_path: Path) -> None:
    tied = write_tiny_checkpoint(tmp_path / "tied", tokenizer=False, tie_word_embeddings=True)
    untied = write_tiny_checkpoint(tmp_path / "untied", tokenizer=False)
    embedding = load_file(untied / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(logits_of(load(tied)), logits_of(load(untied)))
    edit_tensors(untied, lm_head__weight=embedding.clone())
    assert torch.equal(logits_of(load(tied)), logits_of(load(untied)))
    # Some exports of tied models carry the head all the same; the configuration decides.
    edit_tensors(tied, lm_head__weight=torch.full((320, 64), 9.0))
    assert torch.equal(logits_of(load(tied)), logits_of(load(untied)))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, tokenizer=False)
    edit_tensors(path, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(path)


def test_a_tensor_without_a_place_is_refused_but_old_rope_buffers_are_not(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path / "model.safetensors")
    load(path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(path)


def test_a_shape_that_contradicts_the_configuration_is_refused(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, tokenizer=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 1 << 40}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[320, 64\] in the file"):
        load(path)


def test_auto_map_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_checkpoint(tmp_path, tokenizer=False, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (path / "evil.py").write_text("raise SystemExit('executed')")
    with caplog.at_level(logging.WARNING):
        load(path)
    assert "auto_map is ignored" in caplog.text


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, tokenizer=False)
    model = load(path)
    before = logits_of(model)
    file = path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(logits_of(model), before)


def test_the_dtype_asked_for_wins_over_the_published_one(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, dtype=torch.bfloat16, tokenizer=False)
    published = load(path)
    assert published.config.dtype == torch.bfloat16
    asked = load_model(path, ReferenceOps(), torch.float32, CPU)
    assert asked.config.dtype == torch.float32
    assert 1.9 < asked.num_weight_bytes / published.num_weight_bytes < 2.1


def test_no_progress_bar_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(write_tiny_checkpoint(tmp_path, tokenizer=False), progress=True)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == ""


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.03), ("int4", 0.35)])
def test_quantised_weights_stay_near_and_differ(quantization: str, most: float, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, tokenizer=False)
    exact = logits_of(load(path))
    rounded = logits_of(load_model(path, ReferenceOps(quantization), None, CPU))
    relative = float((rounded - exact).norm() / exact.norm())
    assert 0.0 < relative < most


def test_random_weights_are_a_function_of_spec_and_seed() -> None:
    def logits(seed: int) -> Tensor:
        return logits_of(random_model(SPEC, ReferenceOps(), torch.float32, CPU, seed=seed))

    first = logits(1)
    assert torch.equal(first, logits(1))
    assert not torch.equal(first, logits(2))
    assert 0.3 < first.std() < 3, "logits of a random model should be neither flat nor saturated"


def test_weights_drawn_by_the_cpu_as_the_device_are_those_of_every_machine() -> None:
    """`on_device` names the generator and nothing else."""
    everywhere, on_device = (
        logits_of(random_model(SPEC + flag, ReferenceOps(), torch.float32, CPU)) for flag in ("", ",on_device=1")
    )
    assert torch.equal(everywhere, on_device)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_family_can_be_made_at_random(model_type: str) -> None:
    moe = ",experts=4,top_k=2,expert_mlp=32" if model_type == "qwen3_moe" else ""
    model = random_model(f"{SPEC},model_type={model_type},window=8,max_len=64{moe}", ReferenceOps(), torch.float32, CPU)
    assert model.config.windows == ((None, None) if model_type == "llama" else (8, 8))
    assert model.config.max_position == 64
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "not of the form"),
        ("hidden", "'hidden' is not of the form"),
        ("hidden=64", "layers, heads, mlp, vocab must be given"),
        (SPEC + ",depth=3", "'depth' is not known"),
        (SPEC + ",heads=4", "heads is given twice"),
        (SPEC.replace("64", "many"), "hidden is 'many'"),
        (SPEC.replace("layers=2", "layers=0"), "layers is '0'"),
        (SPEC + ",on_device=2", "on_device is '2'; 0 or 1 is needed"),
        (SPEC + ",tie=yes", "tie is 'yes'; 0 or 1 is needed"),
        (SPEC + ",model_type=gpt2", "model_type is 'gpt2'; supported: llama"),
        (SPEC.replace("kv_heads=2", "kv_heads=3"), "not a multiple of num_key_value_heads"),
        (SPEC + ",model_type=qwen3_moe", "num_local_experts is None"),
    ],
)
def test_a_bad_spec_is_refused_with_the_entry_named(spec: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        random_model(spec, ReferenceOps(), torch.float32, CPU)

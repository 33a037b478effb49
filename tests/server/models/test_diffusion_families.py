"""Diffusion families from their published layout: logits equal the publishers' formulas, however a step is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.ops import Ops
from kernels.reference import ReferenceOps
from kernels.select import select_ops
from server.models import llada, llada2_moe
from server.models.checkpoint import file_names
from server.models.config import CheckpointError, ModelConfig
from server.models.layers import weight_shapes
from server.models.loading import load_model
from server.models.registry import parse_config
from tests.server.models.diffusion_oracle import expected_logits
from tests.server.models.paged import PagedRunner
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.tiny_diffusion import DIFFUSION_VOCAB, MASK

CPU = torch.device("cpu")
TOLERANCE = 1e-4
"""Max absolute error of a logit in float32; logits reach about 4, with a tied head 70. Measured: 3e-6 and 2e-5."""
MASK_ALL = 1 << 30

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdar": ("sdar", {}),
    "sdar-tied-8": ("sdar", {"tie_word_embeddings": True, "block_size": 8}),
    "sdar-moe": ("sdar_moe", {}),
    "fast-dllm": ("Fast_dLLM_Qwen", {}),
    "fast-dllm-tied-32": ("Fast_dLLM_Qwen", {"tie_word_embeddings": True, "bd_size": 32}),
    "llada": ("llada", {}),
    "llada-tied-gqa": ("llada", {"weight_tying": True, "n_kv_heads": 2}),
    "dream": ("Dream", {}),
    "llada2-moe": ("llada2_moe", {}),
    "llada2-moe-plain": (
        "llada2_moe",
        {"num_shared_experts": 0, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    ),
    "llada2-moe-one-expert": ("llada2_moe", {"num_experts_per_tok": 1}),
    "llada2-moe-two-shared": ("llada2_moe", {"num_shared_experts": 2, "partial_rotary_factor": 0.25, "block_size": 4}),
}
BLOCK_CAUSAL = [name for name, (model_type, _) in VARIANTS.items() if model_type not in ("llada", "Dream")]

Case = Callable[[str], Path]


@pytest.fixture(params=["reference", "selected"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "reference":
        return ReferenceOps()
    selected = select_ops(CPU, torch.float32, num_threads=1)
    if isinstance(selected, ReferenceOps):
        pytest.skip("no compiled back end on this machine")
    return selected


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small lose more to a second thread than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The checkpoint of a variant, made once."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            model_type, overrides = VARIANTS[variant]
            made[variant] = write_tiny_checkpoint(
                tmp_path_factory.mktemp("model"), model_type, tokenizer=False, seed=len(made), **overrides
            )
        return made[variant]

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens, a third of them masks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, MASK, (length,), generator=generator)
    return tokens.where(torch.rand(length, generator=generator) > 1 / 3, MASK).tolist()


def block_of(config: ModelConfig) -> int | None:
    return None if config.bidirectional else config.block_size


def mask_of(config: ModelConfig) -> int:
    return block_of(config) or MASK_ALL


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 31, 32, 45])
def test_logits_equal_the_published_formulas(variant: str, length: int, ops: Ops, case: Case) -> None:
    model, tokens = load_model(case(variant), ops, None, CPU), prompt(length)
    logits = PagedRunner(model, ops, 1, length).run([(0, 0, tokens)], mask_of(model.config))[0]
    assert logits.shape == (length, DIFFUSION_VOCAB)
    assert_close(logits, expected_logits(case(variant), tokens, block_of(model.config)))


@pytest.mark.parametrize("variant", BLOCK_CAUSAL)
def test_a_sequence_cut_at_any_block_gives_the_same_logits(variant: str, ops: Ops, case: Case) -> None:
    model, tokens = load_model(case(variant), ops, None, CPU), prompt(45, seed=1)
    block = mask_of(model.config)
    expected = expected_logits(case(variant), tokens, block)
    for cut in range(block, 45, block):
        runner = PagedRunner(model, ops, 1, 45)
        parts = [runner.run([(0, start, tokens[start:end])], block)[0] for start, end in ((0, cut), (cut, 45))]
        assert_close(torch.cat(parts), expected)
    runner = PagedRunner(model, ops, 1, 45)
    parts = [runner.run([(0, start, tokens[start : start + block])], block)[0] for start in range(0, 45, block)]
    assert_close(torch.cat(parts), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_denoising_the_same_positions_again_sees_the_new_tokens_only(variant: str, ops: Ops, case: Case) -> None:
    """The keys of a block (or canvas) that was denoised are written over by the next step on it."""
    model, tokens = load_model(case(variant), ops, None, CPU), prompt(40, seed=2)
    mask = mask_of(model.config)
    start = 0 if model.config.bidirectional else 40 // mask * mask - (mask if 40 % mask == 0 else 0)
    runner = PagedRunner(model, ops, 1, 40)
    runner.run([(0, 0, tokens[:start] + [MASK] * (40 - start))], mask)
    logits = runner.run([(0, start, tokens[start:])], mask)[0]
    assert_close(logits, expected_logits(case(variant), tokens, block_of(model.config))[start:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_sequences_in_one_step_do_not_touch_each_other(variant: str, ops: Ops, case: Case) -> None:
    model = load_model(case(variant), ops, None, CPU)
    mask = mask_of(model.config)
    prompts = [prompt(length, seed=length) for length in (1, 15, 16, 17, 33, 40)]
    expected = [expected_logits(case(variant), tokens, block_of(model.config)) for tokens in prompts]
    runner = PagedRunner(model, ops, len(prompts), 40)
    together = runner.run([(i, 0, tokens) for i, tokens in enumerate(prompts)], mask)
    for got, want in zip(together, expected, strict=True):
        assert_close(got, want)
    if model.config.bidirectional:
        return
    # First blocks of some beside whole sequences of others, then what is left.
    cuts = [min(len(tokens), mask * (i % 3)) for i, tokens in enumerate(prompts)]
    firsts = [(i, 0, tokens[:cut]) for i, (tokens, cut) in enumerate(zip(prompts, cuts, strict=True))]
    rests = [(i, cut, tokens[cut:]) for i, (tokens, cut) in enumerate(zip(prompts, cuts, strict=True))]
    runner = PagedRunner(model, ops, len(prompts), 40)
    for step in (firsts, rests):
        spans = [span for span in step if span[2]]
        for (i, start, part), got in zip(spans, runner.run(spans, mask), strict=True):
            assert_close(got, expected[i][start : start + len(part)])


@pytest.mark.parametrize("variant", ["sdar-moe", "llada2-moe", "llada"])
def test_a_sequences_logits_are_the_same_bits_alone_and_in_a_crowd(variant: str, case: Case) -> None:
    ops = select_ops(CPU, torch.float32, num_threads=1)
    if isinstance(ops, ReferenceOps):
        pytest.skip("no compiled back end on this machine")
    model = load_model(case(variant), ops, None, CPU)
    prompts = [prompt(length, seed=length) for length in (5, 17, 32, 1, 40)]
    mask = mask_of(model.config)
    together = PagedRunner(model, ops, 5, 40).run([(i, 0, tokens) for i, tokens in enumerate(prompts)], mask)
    for tokens, got in zip(prompts, together, strict=True):
        alone = PagedRunner(model, ops, 1, 40, seed=3).run([(0, 0, tokens)], mask)[0]
        assert torch.equal(alone, got)


def test_the_mask_matters(case: Case) -> None:
    """Else the tests above could pass with a causal mask."""
    for variant in VARIANTS:
        model, ops, tokens = load_model(case(variant), ReferenceOps(), None, CPU), ReferenceOps(), prompt(45)
        causal = PagedRunner(model, ops, 1, 45).run([(0, 0, tokens)], 1)[0]
        expected = expected_logits(case(variant), tokens, block_of(model.config))
        assert (causal - expected).abs().max() > 100 * TOLERANCE, variant


def test_lladas_head_and_down_projections_share_a_name_and_are_not_mixed_up(tmp_path: Path) -> None:
    # As wide as the vocabulary, so that shapes cannot tell them apart.
    path = write_tiny_checkpoint(
        tmp_path, "llada", tokenizer=False, mlp_hidden_size=64, embedding_size=64, vocab_size=64, mask_token_id=63
    )
    tokens = [index % 62 for index in range(3, 50, 2)]

    def error() -> float:
        model = load_model(path, ReferenceOps(), None, CPU)
        logits = PagedRunner(model, ReferenceOps(), 1, 32).run([(0, 0, tokens)], MASK_ALL)[0]
        return float((logits - expected).abs().max())

    expected = expected_logits(path, tokens, None)
    assert error() <= TOLERANCE
    tensors = load_file(path / "model.safetensors")
    head, down = "model.transformer.ff_out.weight", "model.transformer.blocks.1.ff_out.weight"
    save_file(tensors | {head: tensors[down], down: tensors[head]}, path / "model.safetensors")
    assert error() > 100 * TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_a_file_is_asked_for_by_the_files_name(variant: str, case: Case) -> None:
    model_type, overrides = VARIANTS[variant]
    config = parse_config(tiny_config(model_type, **overrides))
    table = {"llada": llada.NAMES, "llada2_moe": llada2_moe.NAMES}.get(model_type, {})
    shapes = dict(weight_shapes(config))
    names = file_names(shapes, table)
    tensors = load_file(case(variant) / "model.safetensors")
    assert {names[name]: shape for name, shape in shapes.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize("table", [llada.NAMES, llada2_moe.NAMES])
def test_no_two_names_of_a_table_mean_the_same_tensor(table: dict[str, str]) -> None:
    assert len(set(table.values())) == len(table)


@pytest.mark.parametrize(
    ("model_type", "name", "message"),
    [
        ("llada", "model.transformer.blocks.1.ff_out.weight", r"blocks\.1\.ff_out\.weight is \[64, 95\] in the file"),
        ("llada", "model.transformer.ff_out.weight", r"transformer\.ff_out\.weight is \[328, 63\]"),
        ("llada2_moe", "model.layers.0.attention.query_key_value.weight", r"query_key_value.weight is \[128, 63\]"),
        ("llada2_moe", "model.layers.1.mlp.gate.expert_bias", r"gate\.expert_bias is \[15\] in the file"),
        ("llada2_moe", "model.layers.2.mlp.shared_experts.up_proj.weight", r"is \[32, 63\]"),
        ("sdar", "model.layers.0.self_attn.q_norm.weight", r"q_norm\.weight is \[15\]"),
        ("sdar_moe", "model.layers.0.mlp.experts.3.down_proj.weight", r"is \[64, 31\]"),
        ("Dream", "model.layers.1.self_attn.k_proj.bias", r"k_proj\.bias is \[31\]"),
        ("Fast_dLLM_Qwen", "lm_head.weight", r"lm_head\.weight is \[328, 63\]"),
    ],
)
def test_a_wrong_shape_is_refused_under_the_files_name(
    model_type: str, name: str, message: str, tmp_path: Path
) -> None:
    path = write_tiny_checkpoint(tmp_path, model_type, tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {name: tensors[name][..., :-1].contiguous()}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(path, ReferenceOps(), None, CPU)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llada", "model.transformer.ff_out.weight"),
        ("llada2_moe", "model.layers.1.mlp.gate.expert_bias"),
        ("Dream", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_missing_or_additional_tensor_is_named(model_type: str, name: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, model_type, tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    renamed = name.replace("weight", "bias") if "weight" in name else name.replace("bias", "weights")
    save_file(tensors | {renamed: torch.ones(4)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"has {renamed}"):
        load_model(path, ReferenceOps(), None, CPU)
    save_file({n: t for n, t in tensors.items() if n != name}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks {name}"):
        load_model(path, ReferenceOps(), None, CPU)


def test_the_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_checkpoint(tmp_path, "llada", tokenizer=False)
    (path / "modeling.py").write_text("raise SystemExit('executed')")
    load_model(path, ReferenceOps(), None, CPU)
    assert "auto_map is ignored" in caplog.text


def test_a_llama_shaped_file_is_not_taken_for_llada(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, "llada", tokenizer=False)
    other = write_tiny_checkpoint(tmp_path / "llama", "llama", tokenizer=False)
    (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks model\.transformer\.wte\.weight"):
        load_model(path, ReferenceOps(), None, CPU)


def test_a_routers_bias_stays_float32_in_a_half_precision_model(tmp_path: Path) -> None:
    """256 sigmoids between 0 and 1: eight bits of a bias would choose other experts."""
    path = write_tiny_checkpoint(tmp_path, "llada2_moe", tokenizer=False)
    ops = ReferenceOps()
    model = load_model(path, ops, torch.bfloat16, CPU)
    tokens = prompt(30)
    logits = PagedRunner(model, ops, 1, 30).run([(0, 0, tokens)], 8)[0]
    expected = expected_logits(path, tokens, 8)
    # Another choice of experts somewhere costs more than the roundings: most rows must be near, not all.
    errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < 0.04
    (bias,) = [run._layers[0][1]._router.bias_E for run in model._runs[1:]]  # type: ignore[attr-defined]
    assert torch.equal(bias, load_file(path / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"])

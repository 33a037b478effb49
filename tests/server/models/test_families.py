"""Every family's logits equal transformers': whole, in chunks, in a crowd, through scattered and poisoned pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import Ops
from kernels.reference import ReferenceOps
from kernels.select import select_ops
from server.models.config import CheckpointError
from server.models.loading import load_model
from server.models.registry import Model
from tests.server.models.paged import PagedRunner
from tests.tiny import ARCHITECTURES, VOCAB_SIZE, write_tiny_checkpoint

CPU = torch.device("cpu")
TOLERANCE = 1e-4
"""Max absolute error of a logit in float32; logits here reach about 4."""

ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn-mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        }
    },
    "llama3": {
        "max_position_embeddings": 128,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "longrope": {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.0 + 0.9 * i for i in range(8)],
        },
    },
}
"""By name, the config entries; with max_position_embeddings 32 where they do not state it."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2-upper-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-raw-weights": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3-moe-mixed": ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
}

CUT = ("llama", "mistral-window", "qwen2-upper-window", "qwen3", "qwen3-moe")
"""One variant of each family, windowed where it can be, for the tests that run a prompt many times."""

Case = Callable[[str, dict[str, Any]], tuple[Path, Any]]


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
    """A checkpoint of a family and transformers' model of it, made once per variant."""
    from transformers import AutoModelForCausalLM

    made: dict[str, tuple[Path, Any]] = {}

    def make(model_type: str, overrides: dict[str, Any]) -> tuple[Path, Any]:
        key = repr((model_type, overrides))
        if key not in made:
            path = write_tiny_checkpoint(
                tmp_path_factory.mktemp("model"), model_type, tokenizer=False, seed=len(made), **overrides
            )
            oracle = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
            made[key] = path, oracle.eval()
        return made[key]

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected_logits(oracle: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = oracle(torch.tensor([tokens])).logits[0].float()
    return logits


def run_whole(model: Model, ops: Ops, tokens: list[int], page_size: int = 16) -> Tensor:
    return PagedRunner(model, ops, 1, len(tokens), page_size).run([(0, 0, tokens)])[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE, f"max abs error {error}"  # NaN fails too


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_whole_prompt_equal_transformers(variant: str, ops: Ops, case: Case) -> None:
    path, oracle = case(*VARIANTS[variant])
    tokens = prompt(45)
    model = load_model(path, ops, None, CPU)
    expected = expected_logits(oracle, tokens)
    assert expected.abs().max() > 1, "logits too small to tell right from wrong"
    for page_size in (16, 32):
        assert_close(run_whole(model, ops, tokens, page_size), expected)


@pytest.mark.parametrize("variant", CUT)
def test_a_prompt_cut_anywhere_gives_the_same_logits(variant: str, ops: Ops, case: Case) -> None:
    path, oracle = case(*VARIANTS[variant])
    tokens = prompt(21, seed=1)
    model = load_model(path, ops, None, CPU)
    expected = expected_logits(oracle, tokens)
    for cut in range(1, len(tokens)):
        runner = PagedRunner(model, ops, 1, len(tokens), seed=cut)
        first = runner.run([(0, 0, tokens[:cut])])[0]
        second = runner.run([(0, cut, tokens[cut:])])[0]
        assert_close(torch.cat((first, second)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_spans_of_many_sequences_in_one_step_do_not_touch_each_other(variant: str, ops: Ops, case: Case) -> None:
    path, oracle = case(*VARIANTS[variant])
    model = load_model(path, ops, None, CPU)
    prompts = [prompt(length, seed=length) for length in (1, 15, 16, 17, 33, 40)]
    runner = PagedRunner(model, ops, len(prompts), 40)
    # First all but the last three tokens of each, then one token of some beside the rest of others, then the rest.
    done = [max(0, len(tokens) - 3) for tokens in prompts]
    got: list[list[Tensor]] = [[] for _ in prompts]
    for widths in ([max(0, len(t) - 3) for t in prompts], [1, 1, 2, 3, 0, 1], [0, 2, 1, 0, 3, 2]):
        starts = [sum(len(part) for part in parts) for parts in got]
        chosen = [i for i, width in enumerate(widths) if width]
        spans = [(i, starts[i], prompts[i][starts[i] : starts[i] + widths[i]]) for i in chosen]
        for i, logits in zip(chosen, runner.run(spans), strict=True):
            got[i].append(logits)
    assert done[-1] == 37
    for tokens, parts in zip(prompts, got, strict=True):
        assert_close(torch.cat(parts), expected_logits(oracle, tokens))


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_rope_scaling_equals_transformers_beyond_the_original_length(
    model_type: str, rope: str, ops: Ops, case: Case
) -> None:
    path, oracle = case(model_type, {"max_position_embeddings": 32} | ROPE[rope])
    length = 32 if rope == "default" else 100
    tokens = prompt(length, seed=2)
    # Served length = sequence length: where transformers' length-dependent rules and our fixed ones speak of the same.
    model = load_model(path, ops, None, CPU, max_model_len=length)
    assert_close(run_whole(model, ops, tokens), expected_logits(oracle, tokens))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_server_limited_to_the_original_length_runs_the_original_rope(rope: str, ops: Ops, case: Case) -> None:
    path, oracle = case("llama", {"max_position_embeddings": 32} | ROPE[rope])
    tokens = prompt(30, seed=3)
    model = load_model(path, ops, None, CPU, max_model_len=32)
    assert_close(run_whole(model, ops, tokens), expected_logits(oracle, tokens))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_growing_sequence_keeps_the_angles_of_the_keys_it_has_written(rope: str, case: Case) -> None:
    path, oracle = case("llama", {"max_position_embeddings": 32} | ROPE[rope])
    tokens = prompt(100, seed=4)
    ops = ReferenceOps()
    model = load_model(path, ops, None, CPU, max_model_len=100)
    runner = PagedRunner(model, ops, 1, 100)
    parts = [runner.run([(0, start, tokens[start : start + 20])])[0] for start in range(0, 100, 20)]
    assert_close(torch.cat(parts), expected_logits(oracle, tokens))


def test_stretched_rope_is_told_apart_from_the_plain_one(case: Case) -> None:
    tokens = prompt(100, seed=2)
    plain, _ = case("llama", {"max_position_embeddings": 128})
    ops = ReferenceOps()
    base = run_whole(load_model(plain, ops, None, CPU), ops, tokens)
    for rope in ROPE.keys() - {"default"}:
        _, oracle = case("llama", {"max_position_embeddings": 32} | ROPE[rope])
        assert (expected_logits(oracle, tokens) - base).abs().max() > 100 * TOLERANCE, rope


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(dtype: torch.dtype, case: Case) -> None:
    path, oracle = case("qwen3", {})
    tokens = prompt(30)
    ops = select_ops(CPU, dtype, num_threads=1)
    model = load_model(path, ops, dtype, CPU)
    runner = PagedRunner(_of_dtype(model, dtype), ops, 1, 30)
    logits = runner.run([(0, 0, tokens)])[0]
    expected = expected_logits(oracle, tokens)
    relative = (logits - expected).norm() / expected.norm()
    # One rounding of 2^-9 (bf16) or 2^-12 (fp16) per operation, some twenty in two layers.
    assert relative < {torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    assert logits.dtype == torch.float32


def _of_dtype(model: Model, dtype: torch.dtype) -> Model:
    assert model.config.dtype == dtype, "the served dtype is what ModelConfig states after loading"
    return model


def test_rows_past_the_models_positions_are_refused_when_loading(case: Case) -> None:
    path, _ = case("llama", {})
    with pytest.raises(CheckpointError, match="max_model_len is 513"):
        load_model(path, ReferenceOps(), None, CPU, max_model_len=513)

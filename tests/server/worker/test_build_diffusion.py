"""`build_worker` on tiny checkpoints of every diffusion family: what it says of them, pages, and a step of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scheduler.types import MASK_ALL, Admission, DiffusionModel, Read, Request, Sampling, Span, StepPlan, Topology
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.kv_pool import CPU_PAGE_SIZE, GPU_PAGE_SIZE, choose_page_size
from server.worker.worker import Worker
from tests.server.models.diffusion_oracle import expected_logits
from tests.tiny import EOS, write_tiny_checkpoint
from tests.tiny_diffusion import DIFFUSION, DIFFUSION_VOCAB, MASK

CAUSAL, ALL = Topology.BLOCK_CAUSAL, Topology.BIDIRECTIONAL
FACTS = {
    "sdar": DiffusionModel(MASK, 4, CAUSAL),
    "sdar_moe": DiffusionModel(MASK, 4, CAUSAL),
    "Fast_dLLM_Qwen": DiffusionModel(MASK, 8, CAUSAL, shift=1),
    "llada": DiffusionModel(MASK, 32, ALL),
    "Dream": DiffusionModel(MASK, 32, ALL, shift=1),
    "llada2_moe": DiffusionModel(MASK, 8, CAUSAL),
}


def make(folder: Path, **options: object) -> Worker:
    settings: dict[str, object] = {
        "dtype": "float32",
        "device": "cpu",
        "kv_cache_bytes": 3 << 20,
        "num_threads": 1,
        "remember_profile": False,
    }
    return build_worker(WorkerConfig(model=str(folder), **(settings | options)), progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", DIFFUSION)
def test_a_worker_states_how_its_model_denoises_and_what_it_takes(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, model_type)
    info = make(folder).info
    assert info.diffusion == FACTS[model_type]
    tensors = load_file(folder / "model.safetensors")
    assert info.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert info.num_parameters * 4 <= info.weight_bytes < info.num_parameters * 4 * 1.5
    layers, kv_heads = (3 if model_type == "llada2_moe" else 2), (4 if model_type == "llada" else 2)
    assert info.num_pages * info.page_size * layers * kv_heads * 16 * 2 * 4 == info.kv_bytes <= 3 << 20
    assert (info.model_len, info.vocab_size, info.eos_ids) == (512, DIFFUSION_VOCAB, (EOS,))


@pytest.mark.parametrize("model_type", DIFFUSION)
def test_a_step_over_a_whole_sequence_reads_the_published_logits(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, model_type)
    worker, facts = make(folder), FACTS[model_type]
    block = None if facts.topology is ALL else facts.block_size
    tokens = tuple(3 + (i * 37) % 300 for i in range(45))
    request = Request("a", tokens, 4, Sampling(temperature=0.0, logprobs=0))
    span = Span(1, tokens, 0, 45, block or MASK_ALL, judged=(44,), read=Read.SAMPLE)
    pages = tuple(range(-(-45 // worker.info.page_size)))
    outcome = worker.run(StepPlan(1, (span,), (Admission(1, request, tokens),), ((1, pages),))).outcomes[0]
    expected, causal = (expected_logits(folder, tokens, size)[-1].log_softmax(0).max() for size in (block, 1))
    assert outcome.logprobs[0].logprob == pytest.approx(float(expected), abs=1e-4)
    assert abs(expected - causal) > 1e-3, "the step would look right under a causal mask, too"


@pytest.mark.parametrize(
    ("block", "cpu", "gpu"), [(1, 32, 64), (4, 32, 64), (32, 32, 64), (64, 64, 64), (24, 48, 72), (128, 128, 128)]
)
def test_pages_hold_whole_blocks(block: int, cpu: int, gpu: int) -> None:
    model = DiffusionModel(MASK, block)
    assert choose_page_size(None, torch.device("cpu"), model) == cpu
    assert choose_page_size(None, torch.device("cuda"), model) == gpu
    assert choose_page_size(3 * block, torch.device("cpu"), model) == 3 * block


def test_other_models_pages_do_not_depend_on_a_block() -> None:
    for other in (None, DiffusionModel(MASK, 128, ALL)):
        assert choose_page_size(None, torch.device("cpu"), other) == CPU_PAGE_SIZE
        assert choose_page_size(None, torch.device("cuda"), other) == GPU_PAGE_SIZE
        assert choose_page_size(12, torch.device("cpu"), other) == 12


def test_a_page_size_that_cuts_a_block_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "sdar", block_size=64)
    assert make(folder).info.page_size == 64
    with pytest.raises(
        ValueError, match=r"KV pages of 32 tokens end inside .* blocks of 64 tokens; .* a multiple of 64"
    ):
        make(folder, page_size=32)


def test_a_block_size_that_the_file_leaves_open_can_be_asked_for(tmp_path: Path) -> None:
    silent = write_tiny_checkpoint(tmp_path / "silent", "sdar", block_size=None)
    assert make(silent).info.diffusion == DiffusionModel(MASK, 4, CAUSAL)
    asked = make(silent, denoise_block_size=64).info
    assert asked.diffusion == DiffusionModel(MASK, 64, CAUSAL)
    assert asked.page_size == 64
    both = write_tiny_checkpoint(tmp_path / "both", "llada")
    assert make(both, denoise_block_size=16).info.diffusion == DiffusionModel(MASK, 16, ALL)
    stated = write_tiny_checkpoint(tmp_path / "stated", "sdar")
    with pytest.raises(ValueError, match="denoise-block-size is 8, but this model was trained on blocks of 4"):
        make(stated, denoise_block_size=8)


@pytest.mark.parametrize("model_type", ["sdar", "Fast_dLLM_Qwen", "Dream", "llada2_moe"])
def test_families_with_the_usual_field_names_can_be_made_at_random(model_type: str, tmp_path: Path) -> None:
    shape = f"model_type={model_type},hidden=16,layers=2,heads=2,kv_heads=1,mlp=16,vocab=157184"
    moe = ",experts=16,top_k=2,expert_mlp=8" if model_type == "llada2_moe" else ""
    info = make(tmp_path / "nowhere", random_weights=shape + moe, max_model_len=64).info
    assert info.diffusion is not None
    assert info.diffusion.topology is FACTS[model_type].topology

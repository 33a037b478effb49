"""The whole engine over the interpreted kernels and over the CPU's own: block-sparse prompts, beside dense rows and
decodes, give the same tokens with the same probabilities, and others than dense prompts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.ops import Ops
from kernels.select import select_ops
from kernels.triton.ops import TritonOps
from scheduler.types import PromptAttention, PromptMethod, Request, Sampling
from server.engine.config import AttentionConfig, EngineConfig, SpeculationConfig
from server.engine.core import EngineCore
from server.engine.loop import build_core
from server.worker import build
from tests.tiny import write_tiny_checkpoint

Answers = dict[str, list[tuple[int, float]]]


def requests() -> list[Request]:
    rng = random.Random(3)
    greedy = Sampling(temperature=0.0, logprobs=0)
    wishes = {
        "x": (330, PromptAttention(PromptMethod.XATTENTION, 0.3, 128)),
        "pbs": (560, PromptAttention(PromptMethod.PBS, 0.3, 512)),
        "dense": (40, None),
    }
    return [
        Request(name, tuple(rng.randrange(5, 300) for _ in range(length)), 3, greedy, prompt_attention=asked)
        for name, (length, asked) in wishes.items()
    ]


def answers(folder: Path, ops: Ops, asked: list[Request], patch: pytest.MonkeyPatch) -> Answers:
    patch.setattr(build, "select_ops", lambda *args, **options: ops)
    core, _ = build_core(
        EngineConfig(
            model=str(folder), dtype="float32", device="cpu", max_batched_tokens=576, max_seqs=8, max_model_len=700,
            kv_cache_bytes=1 << 20, page_size=64, warm_up=False, progress=False, queue_timeout_s=None,
            speculation=SpeculationConfig(mode="off"),
            attention=AttentionConfig(methods=("xattention", "pbs")),
        )
    )  # fmt: skip
    assert isinstance(core, EngineCore)
    found: Answers = {request.id: [] for request in asked}
    for request in asked:
        core.add(request)
    while core.has_work:
        for delta in core.step()[0]:
            assert delta.fault is None, delta.fault
            found[delta.request_id] += [(logprob.token, logprob.logprob) for logprob in delta.logprobs]
    core.close()
    return found


def test_block_sparse_prompts_give_the_tokens_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_checkpoint(
        tmp_path, "qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    on_cpu = select_ops("cpu", torch.float32, None, 1)
    expected = answers(tmp_path, on_cpu, requests(), monkeypatch)
    dense = answers(tmp_path, on_cpu, [replace(r, prompt_attention=None) for r in requests()], monkeypatch)
    actual = answers(tmp_path, TritonOps(num_programs=2), requests(), monkeypatch)
    for name, wanted in expected.items():
        assert [token for token, _ in actual[name]] == [token for token, _ in wanted]
        assert [logprob for _, logprob in actual[name]] == pytest.approx([logprob for _, logprob in wanted], abs=1e-5)
        is_same = wanted[0][1] == pytest.approx(dense[name][0][1], abs=1e-5)
        assert is_same == (name == "dense"), "a part of the keys was left out, or this shows nothing"

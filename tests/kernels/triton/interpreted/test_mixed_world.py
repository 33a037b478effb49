"""The whole engine over the interpreted kernels and over the CPU's own: the same tokens in one crowd of every kind of
span: prompts in chunks, decodes, chains and trees of drafts, blocks that are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kernels.ops import Ops
from kernels.select import select_ops
from kernels.triton.ops import TritonOps
from scheduler.policies import make_diffusion
from scheduler.types import Drafts, Request, Sampling, Speculation, SpeculationMode, Topology
from server.engine.config import EngineConfig, SpeculationConfig
from server.engine.core import EngineCore
from server.engine.loop import build_core
from server.worker import assembly, build
from server.worker.drafters.base import Want
from tests.server.worker.drafting import ScriptedDrafter, noise, tree
from tests.tiny import write_tiny_checkpoint

NUM_OUT = 7
VOCAB = 320
Answers = dict[str, tuple[int, ...]]


def requests() -> list[Request]:
    greedy, drawn = Sampling(temperature=0.0), Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
    plain, chains, trees = (
        Speculation(SpeculationMode.OFF),
        Speculation(SpeculationMode.ON, tree=False),
        Speculation(SpeculationMode.ON, tree=True),
    )
    made = [
        Request("plain", tuple(range(5, 16)), NUM_OUT, drawn, speculation=plain),
        Request("chain", (9, 8, 7), NUM_OUT, greedy, speculation=chains),
        Request("tree", (7, 8, 9, 10), NUM_OUT, drawn, speculation=trees),
    ]
    for policy in ("threshold", "random"):
        decoding = make_diffusion(policy, Topology.BLOCK_CAUSAL)
        made.append(Request(policy, tuple(range(20, 26)), NUM_OUT, drawn, decoding=decoding, speculation=plain))
    return made


def script(want: Want, follows: Sequence[int]) -> Drafts | None:
    """Drafts that are right about as often as not."""
    return (tree(VOCAB) if want.state.request.id == "tree" else noise(VOCAB))(want, follows)


def answers(folder: Path, ops: Ops, known: Answers, patch: pytest.MonkeyPatch) -> tuple[Answers, set[str]]:
    """Each request's tokens, and what its steps held. known: what drafts are made from."""
    patch.setattr(build, "select_ops", lambda *args, **options: ops)
    patch.setattr(assembly, "build_speculator", lambda *args: ScriptedDrafter(script, known))
    core, _ = build_core(
        EngineConfig(
            model=str(folder), dtype="float32", device="cpu", max_batched_tokens=20, max_seqs=8, max_model_len=64,
            kv_cache_bytes=1 << 20, page_size=16, warm_up=False, progress=False,
            speculation=SpeculationConfig(max_drafts=3),
        )
    )  # fmt: skip
    assert isinstance(core, EngineCore)
    for request in requests():
        core.add(request)
    found: Answers = {}
    held: set[str] = set()
    while core.has_work:
        plan = core.plan()
        assert plan is not None
        deltas, stats = core.execute(plan)
        for delta in deltas:
            assert delta.fault is None, delta.fault
            found[delta.request_id] = found.get(delta.request_id, ()) + delta.tokens
        kinds = {
            "prompt": stats.prefill_tokens, "decode": stats.decode_tokens, "draft": stats.draft_tokens,
            "denoise": stats.denoise_tokens, "tree": any(span.parents for span in plan.spans),
        }  # fmt: skip
        held |= {kind for kind, count in kinds.items() if count}
    core.close()
    return found, held


def test_every_kind_of_span_gives_the_tokens_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_checkpoint(
        tmp_path, "qwen3", num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, mask_token_id=4, block_size=4,
    )  # fmt: skip
    on_cpu = select_ops("cpu", torch.float32, None, 1)
    known, _ = answers(tmp_path, on_cpu, {}, monkeypatch)
    expected, held = answers(tmp_path, on_cpu, known, monkeypatch)
    assert held == {"prompt", "decode", "draft", "denoise", "tree"}
    actual, its = answers(tmp_path, TritonOps(num_programs=2), known, monkeypatch)
    assert actual == expected == known
    assert its == held
    assert all(len(tokens) == NUM_OUT for tokens in actual.values())

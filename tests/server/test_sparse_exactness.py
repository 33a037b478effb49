"""Sparse requests give the same tokens alone, in a crowd with dense ones, in chunks, with drafts, preempted and
resubmitted. The embedded model in float32 on a CPU, its last two layers sparse."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scheduler.types import Attention, AttentionMethod, Request, Sampling, Speculation, SpeculationMode
from server.engine.config import AttentionConfig, EngineConfig, EngineInfo, SpeculationConfig
from server.engine.core import EngineCore
from server.engine.loop import build_core
from server.models.checkpoint import checkpoint_hash
from server.models.locate import resolve_model

NUM_OUT, PAGE = 24, 16
QUEST, LABELS, TIDAL = AttentionMethod.QUEST, AttentionMethod.DOUBLE_SPARSITY, AttentionMethod.TIDAL
LABEL_PAGES = AttentionMethod.DOUBLE_SPARSITY_PAGES
BYTES_PER_PAGE = 4 * 2 * 2 * 64 * 4 * PAGE  # layers x (K and V) x KV heads x head_dim x float32 x tokens of a page


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return tiny_config(tmp_path_factory.mktemp("calibration"))


def save_random_channels(path: Path, shape: tuple[int, int, int], metadata: dict[str, str] | None = None) -> None:
    """All elements of a key as label channels, in an order of their own for each layer and kv head."""
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(shape[2], generator=generator) for _ in range(shape[0] * shape[1])]
    save_file({"channels": torch.stack(orders).view(shape).to(torch.int16)}, path, metadata)


def tiny_config(folder: Path) -> EngineConfig:
    """The embedded model with every method; its label channels, drawn by lot, are kept in `folder`."""
    path = folder / "channels.safetensors"
    save_random_channels(path, (4, 2, 64), {"model_hash": checkpoint_hash(resolve_model("braid-tiny"))})
    return EngineConfig(
        model="braid-tiny",
        dtype="float32",
        max_model_len=512,
        page_size=PAGE,
        max_seqs=16,
        progress=False,
        warm_up=False,
        queue_timeout_s=None,
        num_threads=1,
        kv_cache_bytes=300 * BYTES_PER_PAGE,
        speculation=SpeculationConfig(mode="off"),
        attention=AttentionConfig(methods=tuple(AttentionMethod), calibration=(str(path),)),
    )


def requests() -> list[Request]:
    """Prompts of 90 to 280 tokens, some sharing a prefix; each method, one that never needs to choose, and dense."""
    rng = random.Random(5)
    shared = tuple(rng.randrange(5, 4000) for _ in range(120))
    wishes = [
        *(Attention(QUEST, 112), Attention(LABELS, 69), Attention(TIDAL, 80), Attention(LABEL_PAGES, 112)),
        *(None, Attention(QUEST, 1 << 40)),
    ]
    made = []
    for i in range(12):
        own = tuple(rng.randrange(5, 4000) for _ in range(rng.randrange(110, 160)))
        sampling = Sampling(temperature=0.0 if i < 2 else 1.5, seed=rng.getrandbits(63), logprobs=0)
        prompt = shared + own if i < 6 else own
        made.append(Request(f"r{i}", prompt, NUM_OUT, sampling, attention=wishes[i % 6]))
    return made


@dataclass
class Found:
    """What a request gave: its tokens and, of those that are new, the log-probabilities."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def run(core: EngineCore, asked: Sequence[Request]) -> tuple[list[Found], int, int]:
    """Each request's answer, preemptions and accepted drafts."""
    found = {request.id: Found(list(request.output)) for request in asked}
    preempted = accepted = 0
    for request in asked:
        core.add(request)
    while core.has_work:
        deltas, stats = core.step()
        for delta in deltas:
            assert delta.fault is None
            found[delta.request_id].tokens += delta.tokens
            found[delta.request_id].logprobs += [logprob.logprob for logprob in delta.logprobs]
        if stats is not None:
            preempted += stats.num_preempted
            accepted += stats.accepted_tokens
    return [found[request.id] for request in asked], preempted, accepted


def assert_same(found: Sequence[Found], alone: Sequence[Found]) -> None:
    """The embedded model says little about keys far back, so that one key more or less shows in probabilities first."""
    for mine, other in zip(found, alone, strict=True):
        assert mine.tokens == other.tokens
        assert mine.logprobs == pytest.approx(other.logprobs[-len(mine.logprobs) :], abs=2e-6)


@pytest.fixture(scope="module")
def alone(config: EngineConfig) -> list[Found]:
    core, _ = build_core(replace(config, enable_prefix_caching=False))
    return [run(core, [request])[0][0] for request in requests()]


def engine(config: EngineConfig, **changes: Any) -> tuple[EngineCore, EngineInfo]:
    core, info = build_core(replace(config, **changes))
    assert isinstance(core, EngineCore)
    return core, info


def test_fewer_keys_give_another_text_and_enough_keys_the_same(config: EngineConfig, alone: list[Found]) -> None:
    core, _ = engine(config, attention=AttentionConfig())
    dense = run(core, [replace(request, attention=None) for request in requests()])[0]
    for index, (mine, other) in enumerate(zip(alone, dense, strict=True)):
        if index % 6 > 3:
            assert_same([mine], [other])
        else:
            assert mine.logprobs[0] == pytest.approx(other.logprobs[0], abs=2e-6)  # the prompt's last row
            assert mine.logprobs[1] != pytest.approx(other.logprobs[1], abs=1e-4)


def test_a_crowd_and_its_prefix_pages_change_no_token(config: EngineConfig, alone: list[Found]) -> None:
    core, _ = engine(config)
    assert_same(run(core, requests())[0], alone)
    assert_same(run(core, [replace(request, id=f"again-{request.id}") for request in requests()])[0], alone)


def test_a_dense_request_after_a_sparse_one_with_the_same_text_reads_none_of_its_output(
    config: EngineConfig, alone: list[Found]
) -> None:
    """The longer prompt holds the sparse answer; its pages must be computed anew."""
    core, _ = engine(config)
    request = replace(requests()[0], max_tokens=3 * PAGE)
    [answer], _, _ = run(core, [request])
    longer = Request("longer", request.prompt + tuple(answer.tokens), NUM_OUT, Sampling(temperature=0.0, logprobs=0))
    [found], _, _ = run(core, [longer])
    fresh, _ = engine(config, attention=AttentionConfig(), enable_prefix_caching=False)
    assert_same([found], run(fresh, [longer])[0])


def test_chunks_of_16_change_no_token(config: EngineConfig, alone: list[Found]) -> None:
    core, _ = engine(config, max_batched_tokens=16)
    assert_same(run(core, requests())[0], alone)


def test_preemption_changes_no_token(config: EngineConfig, alone: list[Found]) -> None:
    """A preempted sequence computes its output's rows again as a chunk."""
    core, _ = engine(config, kv_cache_bytes=40 * BYTES_PER_PAGE)
    found, preempted, _ = run(core, requests())
    assert_same(found, alone)
    assert preempted > 0


def test_drafts_change_no_token(config: EngineConfig, alone: list[Found]) -> None:
    core, _ = engine(config, speculation=SpeculationConfig(mode="on", draft_tree=True))
    asked = [replace(r, speculation=Speculation(SpeculationMode.ON)) for r in requests()]
    assert_same(run(core, asked)[0], alone)
    again, _, accepted = run(core, [replace(r, id=f"again-{r.id}") for r in asked])
    assert_same(again, alone)
    assert accepted > 0


def test_a_resubmitted_request_goes_on_where_it_stopped(config: EngineConfig, alone: list[Found]) -> None:
    core, _ = engine(config)
    asked = [
        replace(r, output=tuple(found.tokens[: 5 + i]))
        for i, (r, found) in enumerate(zip(requests(), alone, strict=True))
    ]
    assert_same(run(core, asked)[0], alone)


@pytest.mark.parametrize(("method", "budget"), [(LABELS, 69), (LABEL_PAGES, 112)])
def test_labels_of_4_bits_choose_other_keys_and_these_always(
    config: EngineConfig, alone: list[Found], method: AttentionMethod, budget: int
) -> None:
    """One by one, and in a crowd that preempts."""
    coded = replace(config, attention=replace(config.attention, label_dtype="int4", num_channels=16))
    asked = [replace(request, attention=Attention(method, budget)) for request in requests()]
    single, _ = engine(coded, enable_prefix_caching=False)
    own = [run(single, [request])[0][0] for request in asked]
    core, _ = engine(coded, kv_cache_bytes=40 * BYTES_PER_PAGE)
    found, preempted, _ = run(core, asked)
    assert_same(found, own)
    assert preempted > 0
    of_labels = [at for at, request in enumerate(requests()) if request == asked[at]]
    assert any(own[at].logprobs != pytest.approx(alone[at].logprobs, abs=1e-5) for at in of_labels)


def test_lossless_requests_get_the_dense_text_and_share_their_pages(config: EngineConfig) -> None:
    """The sparse pass drafts; what verifies is dense."""
    plain, _ = engine(config, attention=AttentionConfig(), enable_prefix_caching=False)
    dense = run(plain, [replace(request, attention=None) for request in requests()])[0]
    core, info = engine(config, speculation=SpeculationConfig(mode="on", drafters=("sparse_attention",)))
    assert info.drafters == (("sparse_attention", True),)
    speculation = Speculation(SpeculationMode.ON)
    asked = [
        replace(r, speculation=speculation, attention=r.attention and replace(r.attention, lossless=True))
        for r in requests()
    ]
    found, _, accepted = run(core, asked)
    assert_same(found, dense)
    assert accepted > 0
    # An answer's pages are as good as any: another request begins with them.
    longer = Request("longer", asked[0].prompt + tuple(found[0].tokens), 2)
    core.add(longer)
    _, stats = core.step()
    assert stats is not None
    assert stats.prefix_hits == (len(longer.prompt) - 1) // PAGE * PAGE

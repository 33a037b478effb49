"""K and V in host memory: the same tokens as with all of it here and queries predicted alike, alone, in a crowd, in
chunks, with drafts, preempted, computed again. Random weights in float32 on a CPU, layers 2 to 4 of 6 on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.hosted import Pages
from kernels.kv_format import fill_with_nan
from scheduler.types import Attention, AttentionMethod, Request, Speculation, SpeculationMode
from server.engine.config import AttentionConfig, EngineConfig, SpeculationConfig
from server.engine.core import EngineCore
from server.engine.loop import build_core
from server.worker import offloaded_layers
from server.worker.offload import SharedBuffer
from server.worker.offload_checks import OwnPages
from tests.server.test_mixed_exactness import requests as mixed_requests
from tests.server.test_sparse_exactness import PAGE, Found, assert_same, run, save_random_channels
from tests.server.test_sparse_exactness import config as config
from tests.server.test_sparse_exactness import requests as sparse_requests

LABELS = AttentionMethod.DOUBLE_SPARSITY
NUM_LAYERS, HEAD_DIM = 6, 32
SHAPE = f"hidden=128,layers={NUM_LAYERS},heads=4,kv_heads=2,head_dim={HEAD_DIM},mlp=256,vocab=4096,max_len=512"
DEVICE_PAGE = 4 * 2 * PAGE * (4 * 2 * HEAD_DIM + 4 * 4)
"""Bytes: float32 x KV heads x tokens x (K and V of three layers and the buffer, 4 labels of 4 channels)."""


class Forgetful(SharedBuffer):
    """Nothing of another layer or step is left in it, so that a key that nobody sent for shows."""

    num_begun = 0

    def begin(self, own: Pages, places_M: torch.Tensor) -> None:
        Forgetful.num_begun += 1
        for pages in self._pages:
            fill_with_nan(pages)
        super().begin(own, places_M)


def requests() -> list[Request]:
    """Prompts of 110 to 280 tokens; most choose among labels, some read everything."""
    wishes = [Attention(LABELS, 69), Attention(LABELS, 90), None, Attention(LABELS, 75), Attention(LABELS, 1 << 40)]
    return [replace(request, attention=wishes[i % 5]) for i, request in enumerate(sparse_requests())]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """Nothing on the host."""
    path = tmp_path_factory.mktemp("calibration") / "channels.safetensors"
    save_random_channels(path, (NUM_LAYERS, 2, HEAD_DIM))
    return EngineConfig(
        random_weights=SHAPE,
        dtype="float32",
        max_model_len=512,
        page_size=PAGE,
        max_seqs=16,
        progress=False,
        warm_up=False,
        queue_timeout_s=None,
        num_threads=1,
        kv_cache_bytes=300 * DEVICE_PAGE,
        speculation=SpeculationConfig(mode="off"),
        attention=AttentionConfig(methods=(LABELS,), calibration=(str(path),), num_channels=4),
    )


@pytest.fixture(scope="module")
def offloading(here: EngineConfig) -> EngineConfig:
    return replace(here, attention=replace(here.attention, offload=True))


@pytest.fixture(scope="module")
def alone(offloading: EngineConfig) -> list[Found]:
    """By predicted queries too, but over pages that never move."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloaded_layers, "SharedBuffer", lambda *parts: OwnPages())
        core, _ = build_core(replace(offloading, enable_prefix_caching=False))
    return [run(core, [request])[0][0] for request in requests()]


@pytest.fixture
def engine(offloading: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an engine whose buffer forgets."""
    monkeypatch.setattr(offloaded_layers, "SharedBuffer", Forgetful)
    Forgetful.num_begun = 0

    def make(**changes: Any) -> EngineCore:
        core, _ = build_core(replace(offloading, **changes))
        assert isinstance(core, EngineCore)
        return core

    return make


def test_predicted_queries_choose_other_keys_and_rows_that_read_all_are_dense(
    here: EngineConfig, alone: list[Found]
) -> None:
    core, _ = build_core(here)
    own = run(core, requests())[0]
    for index, (mine, other) in enumerate(zip(alone, own, strict=True)):
        if requests()[index].attention in (None, Attention(LABELS, 1 << 40)):
            assert_same([mine], [other])
        else:
            assert mine.logprobs[0] == pytest.approx(other.logprobs[0], abs=2e-6)  # the prompt's last row
            assert mine.logprobs != pytest.approx(other.logprobs, abs=1e-5)


def test_a_crowd_and_its_prefix_pages_change_no_token(engine: Any, alone: list[Found]) -> None:
    core = engine()
    assert_same(run(core, requests())[0], alone)
    assert_same(run(core, [replace(request, id=f"again-{request.id}") for request in requests()])[0], alone)
    assert Forgetful.num_begun > 0


def test_chunks_of_16_change_no_token(engine: Any, alone: list[Found]) -> None:
    assert_same(run(engine(max_batched_tokens=16), requests())[0], alone)


def test_preemption_changes_no_token(engine: Any, alone: list[Found]) -> None:
    found, preempted, _ = run(engine(kv_cache_bytes=36 * DEVICE_PAGE), requests())
    assert_same(found, alone)
    assert preempted > 0


def test_drafts_change_no_token(engine: Any, alone: list[Found]) -> None:
    """Trees of dense requests are moved where they lie, on the host."""
    core = engine(speculation=SpeculationConfig(mode="on", draft_tree=True))
    asked = [replace(r, speculation=Speculation(SpeculationMode.ON)) for r in requests()]
    assert_same(run(core, asked)[0], alone)
    again, _, accepted = run(core, [replace(r, id=f"again-{r.id}") for r in asked])
    assert_same(again, alone)
    assert accepted > 0


def test_a_long_output_computed_again_in_one_chunk_chooses_among_its_own_keys(engine: Any) -> None:
    """More rows than are always read: the choice waits for the keys that the same step writes."""
    request = replace(requests()[0], max_tokens=6 * PAGE)
    [whole], _, _ = run(engine(), [request])
    for kept in (5 * PAGE + 3, 70):
        [rest], _, _ = run(engine(), [replace(request, output=tuple(whole.tokens[:kept]))])
        assert_same([rest], [whole])


def test_texts_that_are_denoised_or_dense_are_the_same_as_without(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read everything, whatever a block's mask, so nothing is predicted. The embedded model."""
    monkeypatch.setattr(offloaded_layers, "SharedBuffer", Forgetful)
    labels = replace(config.attention, methods=(LABELS,))
    found = []
    for attention in (labels, replace(labels, offload=True)):
        core, _ = build_core(
            replace(config, max_seqs=32, attention=attention, speculation=SpeculationConfig(mode="on"))
        )
        found.append([answer.tokens for answer in run(core, mixed_requests()[:32])[0]])
    assert found[0] == found[1]

"""Corrected sparse requests give the same tokens alone, in a crowd, in chunks, with drafts, preempted and resubmitted,
and what they leave in the KV memory is what a dense request would have left. The embedded model in float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from scheduler.types import Attention, AttentionMethod, Request, Sampling, Speculation, SpeculationMode
from server.engine.config import AttentionConfig, EngineConfig, SpeculationConfig
from server.engine.core import EngineCore
from tests.server.test_sparse_exactness import (
    BYTES_PER_PAGE,
    LABEL_PAGES,
    LABELS,
    PAGE,
    QUEST,
    TIDAL,
    Found,
    assert_same,
    engine,
    requests,
    run,
    tiny_config,
)

EVERY, NUM_OUT = (5, 8, 11), 30


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return tiny_config(tmp_path_factory.mktemp("calibration"))


def corrected(every: Sequence[int] = EVERY) -> list[Request]:
    """The sparse ones of the crowd, corrected at different multiples, and the dense ones as they are."""
    made = []
    for number, request in enumerate(requests()):
        asked = request.attention
        if asked is not None:
            asked = replace(asked, correct_every=every[number % len(every)])
        made.append(replace(request, max_tokens=NUM_OUT, attention=asked))
    return made


@pytest.fixture(scope="module")
def alone(config: EngineConfig) -> list[Found]:
    core, _ = engine(config, enable_prefix_caching=False)
    return [run(core, [request])[0][0] for request in corrected()]


def test_corrections_change_what_comes_behind_them(config: EngineConfig, alone: list[Found]) -> None:
    core, _ = engine(config, enable_prefix_caching=False)
    plain = run(core, corrected(every=(0,)))[0]
    for request, mine, other in zip(corrected(), alone, plain, strict=True):
        assert len(mine.tokens) == NUM_OUT
        if request.attention is None or request.attention.budget > 1000 or request.attention.method is TIDAL:
            # Of four layers the last alone follows a list, and behind its output there is no key to be corrected.
            assert_same([mine], [other])
            continue
        every = request.attention.correct_every
        # The first token is the prompt's; the row of the one behind `every` others is the first to see corrected keys.
        assert mine.tokens[: every + 1] == other.tokens[: every + 1]
        assert mine.logprobs[: every + 1] == pytest.approx(other.logprobs[: every + 1], abs=2e-6)
        assert mine.logprobs[every + 1] != pytest.approx(other.logprobs[every + 1], abs=2e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_batched_tokens": 16}, {"max_batched_tokens": 16, "max_seqs": 3}, {"enable_prefix_caching": False}],
    ids=["crowd", "chunks of 16", "three at a time", "no prefix pages"],
)
def test_company_and_chunks_change_no_token(config: EngineConfig, alone: list[Found], changes: dict[str, Any]) -> None:
    core, _ = engine(config, **changes)
    assert_same(run(core, corrected())[0], alone)
    assert_same(run(core, [replace(request, id=f"again-{request.id}") for request in corrected()])[0], alone)


def test_preemption_changes_no_token(config: EngineConfig, alone: list[Found]) -> None:
    """What was sparse and then corrected is computed once the second time, as dense rows. Who is preempted depends on
    how fast the steps are, so pools of several sizes are tried."""
    num_preempted = 0
    for num_pages in (40, 42, 46, 50, 56):
        core, _ = engine(config, kv_cache_bytes=num_pages * BYTES_PER_PAGE)
        found, preempted, _ = run(core, corrected())
        assert_same(found, alone)
        num_preempted += preempted
    assert num_preempted > 0


def test_steps_planned_ahead_change_no_token(
    config: EngineConfig, alone: list[Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A correction waits for the token in front of it; what is left of it behind its first step is planned ahead."""
    core, _ = engine(config, async_scheduling="on", max_batched_tokens=8)
    corrections: list[bool] = []
    step = core.step

    def noted() -> Any:
        deltas, stats = step()
        corrections.append(stats is not None and stats.is_ahead and stats.corrected_tokens > 0)
        return deltas, stats

    monkeypatch.setattr(core, "step", noted)
    assert_same(run(core, corrected())[0], alone)
    # How a crowd is cut into steps depends on how fast they are. One by one, 11 rows are a step of 8 and one of 3.
    corrections.clear()
    lone = [run(core, [replace(request, id=f"lone-{request.id}")])[0][0] for request in corrected(every=(11,))]
    assert any(corrections), "no correction was planned ahead"
    by_eleven, _ = engine(config, enable_prefix_caching=False)
    assert_same(lone, [run(by_eleven, [request])[0][0] for request in corrected(every=(11,))])


def test_drafts_change_no_token(config: EngineConfig, alone: list[Found]) -> None:
    core, _ = engine(config, speculation=SpeculationConfig(mode="on", draft_tree=True))
    asked = [replace(r, speculation=Speculation(SpeculationMode.ON)) for r in corrected()]
    assert_same(run(core, asked)[0], alone)
    again, _, accepted = run(core, [replace(r, id=f"again-{r.id}") for r in asked])
    assert_same(again, alone)
    assert accepted > 0


@pytest.mark.parametrize("num_out", [1, 5, 6, 7, 22])
def test_a_resubmitted_request_goes_on_where_it_stopped(config: EngineConfig, alone: list[Found], num_out: int) -> None:
    core, _ = engine(config)
    asked = [replace(r, output=tuple(found.tokens[:num_out])) for r, found in zip(corrected(), alone, strict=True)]
    assert_same(run(core, asked)[0], alone)


def kv_of(core: EngineCore, tokens: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, of the pages that are shared of a text."""
    index = core._scheduler._memory.index  # type: ignore[attr-defined]
    names: list[bytes] = []
    index.extend_names(names, tokens, "")
    pages = torch.tensor(index.lookup(names))
    layers = core._worker._pool.layers  # type: ignore[attr-defined]
    return [(k_pages[pages].clone(), v_pages[pages].clone()) for k_pages, v_pages in layers]


@pytest.mark.parametrize("method", [QUEST, LABELS, TIDAL, LABEL_PAGES])
def test_corrected_pages_hold_what_a_dense_request_leaves(config: EngineConfig, method: AttentionMethod) -> None:
    """And they alone are shared: a dense request that goes on from the text begins behind them."""
    number = {QUEST: 0, LABELS: 1, TIDAL: 2, LABEL_PAGES: 3}[method]
    sampling = Sampling(temperature=0.0, logprobs=0)
    request = replace(corrected((24,))[number], sampling=sampling, max_tokens=3 * PAGE)
    core, _ = engine(config)
    text = request.prompt + tuple(run(core, [request])[0][0].tokens)
    # Of 48 tokens the first 24 are corrected: the 48th ends the text, and no row is behind it.
    num_pages = (len(request.prompt) + 24) // PAGE
    mine = kv_of(core, text)
    assert len(mine[0][0]) == num_pages > len(request.prompt) // PAGE

    dense, _ = engine(config, attention=AttentionConfig())
    longer = Request("longer", text, 12, sampling)
    [wanted], _, _ = run(dense, [longer])
    for (k_mine, v_mine), (k_dense, v_dense) in zip(mine, kv_of(dense, text), strict=True):
        torch.testing.assert_close(k_mine, k_dense[:num_pages], rtol=0, atol=2e-5)
        torch.testing.assert_close(v_mine, v_dense[:num_pages], rtol=0, atol=2e-5)

    core.add(longer)
    _, stats = core.step()
    assert stats is not None
    assert stats.prefix_hits == num_pages * PAGE
    core.abort("longer")
    assert_same(run(core, [replace(longer, id="once more")])[0], [wanted])


def test_without_corrections_the_keys_are_others(config: EngineConfig) -> None:
    """What the comparison above is worth."""
    core, _ = engine(config)
    request = replace(corrected((0,))[1], sampling=Sampling(temperature=0.0), max_tokens=3 * PAGE)
    core.add(request)
    tokens: list[int] = []
    while len(tokens) < 2 * PAGE:
        for delta in core.step()[0]:
            tokens += delta.tokens
    (seq,) = core._scheduler._queues.running  # type: ignore[attr-defined]
    at = len(request.prompt) // PAGE + 1
    mine = [k_pages[seq.pages[at]].clone() for k_pages, _ in core._worker._pool.layers]  # type: ignore[attr-defined]
    dense, _ = engine(config, attention=AttentionConfig())
    run(dense, [Request("longer", request.prompt + tuple(tokens), 1)])
    wanted = [k_pages[at] for k_pages, _ in kv_of(dense, request.prompt + tuple(tokens))]
    distance = [float((a - b).abs().max()) for a, b in zip(mine, wanted, strict=True)]
    assert distance[0] < 2e-5  # before any sparse layer
    assert distance[-1] > 1e-3


def test_an_attention_that_cannot_be_is_refused(config: EngineConfig) -> None:
    core, _ = engine(config)
    request = replace(requests()[0], attention=Attention(QUEST, 160, True, 8))
    core.add(request)
    deltas, _ = core.step()
    assert deltas[0].fault is not None
    assert (deltas[0].fault.status, deltas[0].fault.param) == (400, "attention.correct_every")

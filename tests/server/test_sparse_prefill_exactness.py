"""Block-sparse prompts give the same tokens alone, in a crowd, in chunks, with drafts, preempted and resubmitted, and
their pages serve whom they may. The embedded model in float32 on a CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from scheduler.types import (
    Attention,
    AttentionMethod,
    PromptAttention,
    PromptMethod,
    Request,
    Sampling,
    Speculation,
    SpeculationMode,
)
from server.engine.config import AttentionConfig, EngineConfig, SpeculationConfig
from server.engine.core import EngineCore
from server.engine.loop import build_core
from tests.server.test_sparse_exactness import BYTES_PER_PAGE, PAGE, Found, assert_same, run

NUM_OUT, DENSE = 40, 512
X = PromptAttention(PromptMethod.XATTENTION, 0.6, DENSE)
P = PromptAttention(PromptMethod.PBS, 0.5, DENSE)
QUEST = Attention(AttentionMethod.QUEST, 160)


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    return EngineConfig(
        model="braid-tiny",
        dtype="float32",
        max_model_len=1400,
        page_size=PAGE,
        max_batched_tokens=1024,
        max_seqs=16,
        progress=False,
        warm_up=False,
        queue_timeout_s=None,
        num_threads=1,
        kv_cache_bytes=1200 * BYTES_PER_PAGE,
        speculation=SpeculationConfig(mode="off"),
        attention=AttentionConfig(methods=("quest", "xattention", "pbs"), prefill_from=DENSE),
    )


def requests() -> list[Request]:
    """Prompts of 500 to 1,250 tokens, some with 900 in common; each method, one also with sparse output, and dense."""
    rng = random.Random(5)
    shared = tuple(rng.randrange(5, 4000) for _ in range(900))
    wishes: list[tuple[PromptAttention | None, Attention | None]] = [
        (X, None), (P, None), (None, None), (X, QUEST), (replace(X, threshold=0.9), None), (P, None),
    ]  # fmt: skip
    made = []
    for i, (prompt_attention, attention) in enumerate((*wishes, *wishes[:2])):
        own = tuple(rng.randrange(5, 4000) for _ in range((150, 137, 1, 350, 2, 124)[i % 6]))
        sampling = Sampling(temperature=0.0 if i % 2 else 1.5, seed=rng.getrandbits(63), logprobs=0)
        prompt = (shared if i != 3 else shared[:500]) + own
        made.append(Request(f"r{i}", prompt, NUM_OUT, sampling, attention=attention, prompt_attention=prompt_attention))
    return made


def engine(config: EngineConfig, **changes: Any) -> EngineCore:
    return build_core(replace(config, **changes))[0]


@pytest.fixture(scope="module")
def alone(config: EngineConfig) -> list[Found]:
    core = engine(config, enable_prefix_caching=False)
    return [run(core, [request])[0][0] for request in requests()]


def again(asked: Sequence[Request]) -> list[Request]:
    return [replace(request, id=f"again-{request.id}") for request in asked]


def test_tiles_left_out_give_another_text_and_none_left_out_the_same(config: EngineConfig, alone: list[Found]) -> None:
    core = engine(config)
    dense = run(core, [replace(request, prompt_attention=None) for request in requests()])[0]
    for request, mine, other in zip(requests(), alone, dense, strict=True):
        if request.prompt_attention is None:
            assert_same([mine], [other])
        else:
            assert mine.logprobs[0] != pytest.approx(other.logprobs[0], abs=1e-5)
    every = [replace(r, id=f"all-{r.id}", prompt_attention=replace(X, threshold=1.0)) for r in requests()]
    assert_same(run(core, every)[0], dense)
    # A prompt that ends where tiles begin to be chosen is a dense one, and so are its pages.
    short = Request("short", requests()[0].prompt[:DENSE], NUM_OUT, Sampling(temperature=0.0, logprobs=0))
    [found] = run(core, [replace(short, prompt_attention=X)])[0]
    assert_same([found], run(core, [replace(short, id="dense")])[0])


def test_a_crowd_and_its_prefix_pages_change_no_token(config: EngineConfig, alone: list[Found]) -> None:
    core = engine(config)
    assert_same(run(core, requests())[0], alone)
    assert_same(run(core, again(requests()))[0], alone)


@pytest.mark.parametrize("budget", [527, 640])
def test_small_steps_change_no_token(config: EngineConfig, alone: list[Found], budget: int) -> None:
    core = engine(config, max_batched_tokens=budget)
    assert_same(run(core, requests())[0], alone)


def test_preemption_changes_no_token(config: EngineConfig, alone: list[Found]) -> None:
    """Who is preempted depends on how fast the steps are, so pools of several sizes are tried."""
    num_preempted = 0
    for num_pages in (122, 126, 130, 140, 160):
        core = engine(config, kv_cache_bytes=num_pages * BYTES_PER_PAGE)
        found, preempted, _ = run(core, requests())
        assert_same(found, alone)
        num_preempted += preempted
    assert num_preempted > 0


def test_drafts_change_no_token(config: EngineConfig, alone: list[Found]) -> None:
    core = engine(config, speculation=SpeculationConfig(mode="on", draft_tree=True))
    asked = [replace(r, speculation=Speculation(SpeculationMode.ON)) for r in requests()]
    assert_same(run(core, asked)[0], alone)
    found, _, accepted = run(core, again(asked))
    assert_same(found, alone)
    assert accepted > 0


def test_a_resubmitted_request_goes_on_where_it_stopped(config: EngineConfig, alone: list[Found]) -> None:
    core = engine(config)
    asked = [
        replace(r, output=tuple(found.tokens[: 2 + i]))
        for i, (r, found) in enumerate(zip(requests(), alone, strict=True))
    ]
    assert_same(run(core, asked)[0], alone)


def hits_of(core: EngineCore, request: Request) -> int:
    """Tokens that a request finds, once it is admitted; it runs to its end."""
    core.add(request)
    hits = 0
    while core.has_work:
        _, stats = core.step()
        hits += 0 if stats is None else stats.prefix_hits
    return hits


@pytest.mark.parametrize("first", [None, X, P])
def test_pages_behind_the_dense_rows_serve_prompts_with_the_same_settings_alone(
    config: EngineConfig, first: PromptAttention | None
) -> None:
    """Rows before are everybody's. Of a chosen region all tokens must be the same."""
    rng = random.Random(9)
    prompt = tuple(rng.randrange(5, 4000) for _ in range(1300))
    other = replace(X, threshold=0.61)
    for second in (None, X, P, other):
        core = engine(config)
        assert hits_of(core, Request("first", prompt, 2, prompt_attention=first)) == 0
        hits = hits_of(core, Request("second", prompt, 2, prompt_attention=second))
        whole = {None: 1296, X: 1280, P: 1024}[first]
        assert hits == (whole if second == first else DENSE)
    # Another end of the prompt: the regions before it are found, the one that it changes is not.
    if first is not None:
        core = engine(config)
        hits_of(core, Request("first", prompt, 2, prompt_attention=first))
        changed = (*prompt[:1020], 4, *prompt[1021:])
        region = first.method.region
        assert hits_of(core, Request("second", changed, 2, prompt_attention=first)) == 1020 // region * region
        assert hits_of(core, Request("third", changed, 2, prompt_attention=first)) == 1300 // region * region


@pytest.mark.parametrize(("wish", "why"), [(P, "pbs computes 512 rows"), (X, "xattention computes 128 rows")])
def test_a_budget_that_holds_no_region_is_refused_at_start(
    config: EngineConfig, wish: PromptAttention, why: str
) -> None:
    attention = AttentionConfig(methods=(wish.method,), prefill_from=DENSE)
    rows = wish.method.region + 15
    engine(config, attention=attention, max_batched_tokens=rows)
    with pytest.raises(ValueError, match=why):
        engine(config, attention=attention, max_batched_tokens=rows - 1)


def test_pages_that_a_tile_does_not_hold_whole_are_refused_at_start(config: EngineConfig) -> None:
    with pytest.raises(ValueError, match="page_size is 24"):
        engine(config, page_size=24)
